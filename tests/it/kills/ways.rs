//! How the program dies.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::Random;
use super::cases::Prepared;
use crate::support::PATIENCE;
use crate::support::program;
use crate::support::watch::{Kill, Phase, Watched};

/// A way to die.
#[derive(Debug)]
pub enum Way {
    /// None: the job is left alone.
    None,
    /// SIGKILL at a share of the time that the whole job takes.
    Instant(f64),
    /// SIGKILL in its first moments: while it opens and resumes.
    Opening(f64),
    /// SIGKILL at an event of its log.
    Phase(Kill),
    /// SIGKILL at the n-th call of a kind in one of its threads, before the system does it.
    Call(&'static str, u32),
    /// Stopped for a while, continued, and killed.
    Stopped(f64),
    /// From an instant on, the system gives it no more memory.
    Memory(f64),
    /// The n-th write to the journal finds the disk full or broken.
    Refused(&'static str, u32),
}

/// How a process ended.
pub enum End {
    Done,
    Died,
    Failed(String),
}

const CALLS: [&str; 6] =
    ["fsync,fdatasync", "rename,renameat,renameat2", "unlink,unlinkat", "ftruncate", "pwrite64", "write"];

impl Way {
    pub fn pick(random: &mut Random) -> Self {
        // Far counts are rare: small jobs make few calls.
        let count = |random: &mut Random, most: f64| most.powf(random.share()) as u32;
        match random.below(16) {
            0..4 => Self::Instant(random.share()),
            4..6 => Self::Opening(random.share()),
            6..9 => {
                let phases = [Phase::Started, Phase::Generating, Phase::Generated, Phase::Stepped, Phase::Saved];
                let phase = phases[random.below(phases.len())];
                let step = if phase == Phase::Started { 0 } else { 1 + random.below(12) as u64 };
                let delay = Duration::from_millis(random.below(20) as u64);
                Self::Phase(Kill { stage: 0, phase, step, delay })
            }
            9..13 if has_strace() => {
                let call = CALLS[random.below(CALLS.len())];
                Self::Call(call, count(random, if call.contains("write") { 2000.0 } else { 60.0 }))
            }
            13 => Self::Stopped(random.share()),
            14 => Self::Memory(random.share()),
            15 if has_strace() => {
                let error = ["ENOSPC", "EIO"][random.below(2)];
                Self::Refused(error, count(random, 100.0))
            }
            _ => Self::Instant(random.share()),
        }
    }

    /// Its name in the table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Instant(_) => "instant",
            Self::Opening(_) => "opening",
            Self::Phase(_) => "phase",
            Self::Call(..) => "call",
            Self::Stopped(_) => "stopped",
            Self::Memory(_) => "memory",
            Self::Refused(..) => "disk error",
        }
    }
}

/// Whether calls of the system can be aimed at.
fn has_strace() -> bool {
    use crate::support::parts::{Part, skip};
    static FOUND: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let found = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).status().is_ok_and(|s| s.success());
        if !found {
            skip(Part::Strace, "strace is missing or may not trace; no death is aimed at a call");
        }
        found
    });
    *FOUND
}

/// `run` where nothing is there to resume.
fn arguments(job: &Prepared, resume: bool) -> [&str; 2] {
    match resume && job.directory.join("job.toml").exists() {
        true => ["resume", job.directory.to_str().unwrap()],
        false => ["run", job.file.to_str().unwrap()],
    }
}

/// Runs or resumes a job until it dies or ends.
pub fn run(job: &Prepared, way: &Way, whole: Duration, random: &mut Random) -> End {
    let first = attempt(job, way, whole, random, true);
    // Killed between keeping its settings and its first record, a job has nothing to resume: it is run again.
    match first {
        End::Failed(stderr) if stderr.contains("holds no job") => attempt(job, way, whole, random, false),
        end => end,
    }
}

fn attempt(job: &Prepared, way: &Way, whole: Duration, random: &mut Random, resume: bool) -> End {
    let arguments = arguments(job, resume);
    let plain = || {
        let mut command = program();
        command.args(arguments);
        command
    };
    let strace = |inject: String, path: Option<&Path>| {
        let calls = inject.split_once(':').expect("calls and what becomes of them").0.to_string();
        let mut command = Command::new("strace");
        command.args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            &format!("trace={calls}"),
            "-e",
            &format!("inject={inject}"),
        ]);
        match path {
            Some(path) => command.arg("-P").arg(path),
            None => command.arg("--seccomp-bpf"),
        };
        command.arg(program().get_program()).args(arguments);
        command
    };
    match way {
        Way::None => ended(Started::new(plain()).wait(), false),
        Way::Instant(share) => Started::new(plain()).killed_after(whole.mul_f64(*share)),
        Way::Opening(share) => Started::new(plain()).killed_after(Duration::from_millis(400).mul_f64(*share)),
        Way::Phase(kill) => at_phase(&arguments, *kill),
        Way::Call(calls, n) => ended(Started::new(strace(format!("{calls}:signal=KILL:when={n}"), None)).wait(), false),
        Way::Refused(error, n) => {
            let journal = job.directory.join("store.journal");
            let inject = format!("write:error={error}:when={n}..{}", n + 1);
            ended(Started::new(strace(inject, Some(&journal))).wait(), true)
        }
        Way::Stopped(share) => {
            let mut process = Started::new(plain());
            if let Some(end) = process.ends_within(whole.mul_f64(*share)) {
                return ended(end, false);
            }
            process.signal(libc::SIGSTOP);
            std::thread::sleep(Duration::from_millis(50 + random.below(200) as u64));
            process.signal(libc::SIGCONT);
            process.killed_after(whole.mul_f64(0.1 * random.share()))
        }
        Way::Memory(share) => {
            let mut process = Started::new(plain());
            if let Some(end) = process.ends_within(whole.mul_f64(*share)) {
                return ended(end, false);
            }
            process.limit_memory(random.below(4 << 20) as u64);
            // Where no thread can be started for a file's work, it waits for one.
            process.killed_after(Duration::from_secs(20))
        }
    }
}

/// Kills it at an event of its log, if that comes.
fn at_phase(arguments: &[&str], kill: Kill) -> End {
    let mut running = Watched::start(arguments);
    while let Some(seen) = running.next() {
        if seen.phase == kill.phase && seen.step >= kill.step {
            std::thread::sleep(kill.delay);
            return ended((running.kill_or_end(), String::new()), false);
        }
    }
    ended(running.end_with_log(), false)
}

/// What an end means. Some deaths are errors that the job reports: no memory, a broken disk.
fn ended((status, stderr): (ExitStatus, String), errors: bool) -> End {
    match (status.code(), status.signal()) {
        (Some(0), _) => End::Done,
        (_, Some(libc::SIGKILL)) => End::Died,
        (Some(137), _) => End::Died, // as strace reports it
        (_, Some(libc::SIGABRT)) if errors => End::Died,
        (Some(1 | 101 | 134), _) if errors => End::Died,
        _ => End::Failed(format!("{status}: {stderr}")),
    }
}

/// A process whose standard error is kept.
pub struct Started {
    child: Child,
    stderr: std::thread::JoinHandle<String>,
    /// Whether it may have met the end of its memory.
    starved: bool,
}

impl Started {
    pub fn new(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = std::io::Read::read_to_end(&mut pipe, &mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, stderr, starved: false }
    }

    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: a plain system call; the child is not yet waited for, so its number is its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// Waits for a time; the end, if it comes within.
    pub fn ends_within(&mut self, time: Duration) -> Option<(ExitStatus, String)> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some((status, self.stderr()));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        None
    }

    fn stderr(&mut self) -> String {
        std::mem::replace(&mut self.stderr, std::thread::spawn(String::new)).join().unwrap()
    }

    fn killed_after(mut self, time: Duration) -> End {
        if let Some(end) = self.ends_within(time) {
            return ended(end, self.starved);
        }
        self.signal(libc::SIGKILL);
        let end = self.wait();
        ended(end, false)
    }

    /// Waits for its end, which it may take long to come to, and not for ever.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        match self.ends_within(PATIENCE) {
            Some(end) => end,
            None => {
                self.signal(libc::SIGKILL);
                self.child.wait().unwrap();
                panic!("the job stood still: {}", self.stderr());
            }
        }
    }

    /// From now on it gets no more than this beyond what it has.
    fn limit_memory(&mut self, more: u64) {
        self.starved = true;
        let pages = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap_or_default();
        let pages: u64 = pages.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        let bytes = pages * 4096 + more;
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: `limit` outlives the call, and no old limit is asked for.
        unsafe { libc::prlimit(self.child.id() as libc::pid_t, libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
    }
}

/// Kills a command that reads a job which does not run: at a random instant or call. Whether it died.
pub fn killed_beside(job: &Prepared, random: &mut Random) -> bool {
    let out = job.directory.with_extension("exported");
    let directory = job.directory.to_str().unwrap();
    let mut command = program();
    match random.below(3) {
        0 => command.args(["export", directory, "--model", out.to_str().unwrap()]),
        1 => command.args(["verify", directory]),
        _ => command.args(["status", directory]),
    };
    let end = Started::new(command).killed_after(Duration::from_millis(150).mul_f64(random.share()));
    let _ = std::fs::remove_dir_all(out);
    matches!(end, End::Died)
}
