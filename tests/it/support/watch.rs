//! The real program, watched by its log and killed at chosen events, so that no test counts on how fast it is.

use std::io::{BufRead, BufReader, PipeReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rehearsal::lm::random::Stream;

use super::program;

/// What a job logs, as far as kills are aimed at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The roles are up.
    Started,
    /// A completion of a step is there and logged, and others are not.
    Generating,
    /// All completions of a step are there and logged; scoring, the reference and the update come next.
    Generated,
    /// A step is done; a checkpoint, if it is due, is about to be written.
    Stepped,
    /// A checkpoint is durable.
    Saved,
    /// The job, or a stage of a chain, has exported its model and ended.
    Finished,
}

impl Phase {
    /// Those of a job that learns from what it generates.
    pub const OF_ROLLOUTS: [Self; 6] =
        [Self::Generating, Self::Generated, Self::Stepped, Self::Generated, Self::Saved, Self::Started];
    /// Those of a job that learns from data.
    pub const OF_DATA: [Self; 4] = [Self::Stepped, Self::Saved, Self::Started, Self::Stepped];
}

/// An event of a job's log. `step` is as the program counts: of the step under way while generating, else of those done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub phase: Phase,
    pub step: u64,
}

impl Seen {
    /// Reads a line of the log; `None` for all lines that no kill is aimed at.
    fn of(line: &str) -> Option<Self> {
        let event = line.split_once("event=")?.1;
        let number = |key: &str| -> Option<u64> {
            let digits = event.split_once(key)?.1;
            digits[..digits.find(|c: char| !c.is_ascii_digit())?].parse().ok()
        };
        let phase = match event.split(|c: char| !c.is_ascii_alphabetic()).next()? {
            "Started" => Phase::Started,
            "Rollout" if number(" done: ")? < number(" of: ")? => Phase::Generating,
            "Rollout" => Phase::Generated,
            "Step" => Phase::Stepped,
            "Checkpoint" => Phase::Saved,
            "Finished" => Phase::Finished,
            _ => return None,
        };
        Some(Self { phase, step: number(" step: ")? })
    }
}

/// A kill: at the first event of a phase at which the job is at a step or past it.
#[derive(Debug, Clone, Copy)]
pub struct Kill {
    /// Place of the stage in a chain; 0 in a job without stages.
    pub stage: usize,
    pub phase: Phase,
    pub step: u64,
    /// Waited from the event to the kill, to hit what follows it. The job gets no further than its next event but one,
    /// however fast it is.
    pub delay: Duration,
}

/// The running program. It waits for its log to be read and is at most two lines ahead.
pub struct Watched {
    child: Child,
    log: BufReader<PipeReader>,
    /// An event that was read and not yet handed out.
    peeked: Option<Seen>,
    /// The last line of the log that was read.
    last: String,
}

impl Watched {
    pub fn start(args: &[&str]) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        one_line_at_a_time(&writer);
        let mut command = program();
        command.args(args).env("RUST_LOG", "rehearsal=debug").stdout(Stdio::null()).stderr(writer);
        // The command holds the writer's end; the log must end with the child.
        let child = command.spawn().unwrap();
        drop(command);
        Self { child, log: BufReader::new(reader), peeked: None, last: String::new() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Reads on to the next event that counts; `None` once the program has ended.
    pub fn next(&mut self) -> Option<Seen> {
        if let Some(seen) = self.peeked.take() {
            return Some(seen);
        }
        let mut line = Vec::new();
        while self.log.read_until(b'\n', &mut line).unwrap() > 0 {
            self.last = String::from_utf8_lossy(&line).into_owned();
            let seen = Seen::of(&self.last);
            if seen.is_some() {
                return seen;
            }
            line.clear();
        }
        None
    }

    /// Reads on to an event of a phase.
    #[track_caller]
    pub fn until(&mut self, phase: Phase) -> Seen {
        loop {
            match self.next() {
                Some(seen) if seen.phase == phase => return seen,
                Some(_) => {}
                None => panic!("the program ended ({:?}) before {phase:?}", self.child.wait()),
            }
        }
    }

    /// SIGKILL, to a program that has not ended.
    #[track_caller]
    pub fn kill(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the program ended before it was killed");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGKILL, unless it ends by itself before: how it ended.
    pub fn kill_or_end(mut self) -> std::process::ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }

    /// Reads the log to its end.
    pub fn end(self) -> std::process::ExitStatus {
        self.end_with_log().0
    }

    /// Reads the log to its end, and returns its last line too.
    pub fn end_with_log(mut self) -> (std::process::ExitStatus, String) {
        while self.next().is_some() {}
        (self.child.wait().unwrap(), std::mem::take(&mut self.last))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a pipe hold one line, so that who writes the next waits until it was read.
#[cfg(target_os = "linux")]
fn one_line_at_a_time(pipe: &std::io::PipeWriter) {
    use std::os::fd::AsRawFd;
    const PAGE: libc::c_int = 4096;
    // SAFETY: plain system calls on a descriptor that is open. In packets, each write takes a page of its own.
    let set = unsafe {
        libc::fcntl(pipe.as_raw_fd(), libc::F_SETFL, libc::O_WRONLY | libc::O_DIRECT) == 0
            && libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, PAGE) >= 0
    };
    assert!(set, "{}", std::io::Error::last_os_error());
}

/// Elsewhere a pipe holds what it holds, and the job may be some lines ahead.
#[cfg(not(target_os = "linux"))]
fn one_line_at_a_time(_pipe: &std::io::PipeWriter) {}

/// Kills of a job at phases in turn, spread over its steps; every other one comes a moment after its event.
pub fn spread(stage: usize, steps: u64, kills: u64, phases: &[Phase]) -> Vec<Kill> {
    let random = Stream::new(99, stage as u64);
    // Room at the end: a checkpoint that a kill waits for is not the last, and more is logged after every kill.
    let last = steps.saturating_sub(5).max(1);
    let kill = |(i, &phase): (u64, &Phase)| {
        let step = if phase == Phase::Started { 0 } else { 1 + i * last / kills };
        let delay = Duration::from_millis((i % 2) * (random.uniform(i) * 40.0) as u64);
        Kill { stage, phase, step, delay }
    };
    (0..kills).zip(phases.iter().cycle()).map(kill).collect()
}

/// A job's file and directory, run to the end through kills.
pub struct Victim<'a> {
    pub file: &'a Path,
    pub directory: &'a Path,
    /// Folders of a chain's stages, in order; empty for a job without.
    pub stages: &'a [&'a str],
}

impl Victim<'_> {
    /// Starts it, or resumes it if its settings are kept.
    fn begin(&self) -> Watched {
        match self.directory.join("job.toml").exists() {
            true => Watched::start(&["resume", self.directory.to_str().unwrap()]),
            false => Watched::start(&["run", self.file.to_str().unwrap()]),
        }
    }

    /// Starts or resumes it and waits until its roles are up.
    fn start(&self) -> Watched {
        let mut running = self.begin();
        running.peeked = running.next();
        match running.peeked {
            Some(_) => running,
            // Killed between keeping its settings and its first record, a job has nothing to resume: it is run again.
            None => Watched::start(&["run", self.file.to_str().unwrap()]),
        }
    }

    /// The stage that a process that starts now goes on with: the first without a model, or the last.
    fn stage(&self) -> usize {
        let model = |stage: &&&str| self.directory.join(stage).join("model").is_dir();
        let done = self.stages.iter().take_while(model).count();
        done.min(self.stages.len().saturating_sub(1))
    }

    /// Kills it a time after it was started, wherever it may be then.
    pub fn killed_after(&self, time: Duration) {
        let running = self.begin();
        std::thread::sleep(time);
        drop(running);
    }

    /// Kills it at each of the events, in order, and lets it end.
    #[track_caller]
    pub fn survives(&self, kills: &[Kill]) {
        for kill in kills {
            let mut stage = self.stage();
            let mut running = self.start();
            let mut first = true;
            loop {
                let Some(seen) = running.next() else {
                    panic!("the job ended with {:?} before {kill:?}", running.child.wait());
                };
                if seen.phase == Phase::Started && !std::mem::take(&mut first) {
                    stage += 1;
                }
                assert!(stage <= kill.stage, "stage {stage} began before {kill:?}");
                if stage == kill.stage && seen.phase == kill.phase && seen.step >= kill.step {
                    break;
                }
            }
            std::thread::sleep(kill.delay);
            running.kill();
        }
        let status = self.start().end();
        assert!(status.success(), "{status}");
    }
}
