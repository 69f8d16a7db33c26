//! What checkpoints cost: the wall time of steps with checkpoints beside that without, in turn; bytes written; the time from
//! the start to the next step after a kill; the size of a job; and what the disk does meanwhile.
//!
//!     cargo bench --bench checkpoints                     # the embedded model, all weights
//!     cargo bench --bench checkpoints -- lora             # its adapters
//!     cargo bench --bench checkpoints -- MODEL 10         # a model's directory or file, 10 steps an arm
//!     cargo bench --bench checkpoints -- restart [MODEL]  # from a kill to the next step
//!     cargo bench --bench checkpoints -- soak 10000       # size, bytes written and memory over many steps

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use rehearsal::{Config, Event, Job};

/// Alternations of all arms.
const ROUNDS: usize = 7;
/// Steps that are taken before the clock starts.
const WARM_UP: u64 = 3;

/// A way to make checkpoints.
#[derive(Clone, Copy)]
enum Arm {
    Never,
    Every(u64),
    Share(f64),
}

impl Arm {
    fn keys(self) -> String {
        match self {
            Arm::Never => "every_steps = 1000000".into(),
            Arm::Every(steps) => format!("every_steps = {steps}"),
            Arm::Share(share) => format!("every_steps = 1000\noverhead = {share}"),
        }
    }

    fn name(self) -> String {
        match self {
            Arm::Never => "none".into(),
            Arm::Every(steps) => format!("every {steps}"),
            Arm::Share(share) => format!("overhead {share}"),
        }
    }
}

fn config(directory: &Path, steps: u64, arm: Arm, model: &str) -> Config {
    let (policy, more) = match model {
        "" => (String::new(), ""),
        "lora" => (String::new(), "[lora]\nrank = 8\n"),
        path => (format!("[model]\npolicy = \"{path}\"\n"), ""),
    };
    let text = format!(
        "[job]\ndirectory = \"{}\"\nsteps = {steps}\n{policy}{more}[rollout]\nprompts_per_step = 4\n\
         completions_per_prompt = 2\nmax_new_tokens = 24\n[reward]\nrules = [\"distinct_words\"]\n[checkpoint]\n{}\n",
        directory.display(),
        arm.keys()
    );
    Config::from_toml(&text, Path::new(".")).unwrap_or_else(|e| panic!("{e}"))
}

/// Seconds of the steps after the warm-up, and checkpoints and bytes of checkpoints in them.
fn measure(runtime: &tokio::runtime::Runtime, steps: u64, arm: Arm, model: &str) -> (f64, u64, u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(&folder.path().join("job"), steps + WARM_UP + 1, arm, model);
    runtime.block_on(async {
        let job = Job::builder(config).start().await.expect("a job");
        let mut events = job.events();
        let (mut start, mut checkpoints, mut bytes) = (None, 0, 0);
        loop {
            match events.recv().await.expect("an event") {
                Event::Step(summary) if summary.step == WARM_UP => start = Some(Instant::now()),
                Event::Checkpoint { bytes: written, .. } if start.is_some() => {
                    checkpoints += 1;
                    bytes += written;
                }
                Event::Step(summary) if summary.step == WARM_UP + steps => {
                    let seconds = start.expect("a start").elapsed().as_secs_f64();
                    job.stop();
                    job.wait().await.expect("an outcome");
                    return (seconds, checkpoints, bytes);
                }
                _ => {}
            }
        }
    })
}

/// What the disk writes and syncs, in MB/s.
fn disk() -> f64 {
    let mut file = tempfile::tempfile().expect("a file");
    let data = vec![7u8; 64 << 20];
    let start = Instant::now();
    file.write_all(&data).and_then(|()| file.sync_all()).expect("space");
    64.0 / start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes of all files in a folder.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let of = |entry: &std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.iter().map(of).sum()
}

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().expect("a number") / 1024.0
}

/// Slope of a line through points, and half the width of its 95 % interval.
fn slope(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    let (mx, my) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let sxx: f64 = points.iter().map(|p| (p.0 - mx).powi(2)).sum();
    let slope = points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum::<f64>() / sxx;
    let residual: f64 = points.iter().map(|p| (p.1 - my - slope * (p.0 - mx)).powi(2)).sum();
    (slope, 1.96 * (residual / (n - 2.0) / sxx).sqrt())
}

/// Bytes that this process has had written to disks.
fn written() -> f64 {
    let io = std::fs::read_to_string("/proc/self/io").expect("Linux");
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).expect("a line write_bytes");
    line.trim().parse().expect("a number")
}

/// How often a job is killed.
const RESTARTS: usize = 7;
/// The argument by which this program runs the job that is killed.
const CHILD: &str = "child";

/// Runs a job until the process is killed.
fn child(runtime: &tokio::runtime::Runtime, directory: &Path, model: &str) {
    let config = config(directory, 1_000_000, Arm::Every(2), model);
    runtime
        .block_on(async { Job::builder(config).start_or_resume().await.expect("a job").wait().await.expect("an end") });
}

/// Kills a job while it generates, and measures what a resumed one does until its next step is done.
fn restart(runtime: &tokio::runtime::Runtime, model: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("job");
    let (mut opening, mut stepping, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    let lines = || std::fs::read_to_string(directory.join("history.jsonl")).unwrap_or_default().lines().count();
    for round in 0..RESTARTS {
        let mut process = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args([CHILD.as_ref(), directory.as_os_str(), model.as_ref()])
            .spawn()
            .expect("a process");
        let begun = lines();
        while lines() < begun + 3 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        // At another place of the step in each round.
        std::thread::sleep(std::time::Duration::from_millis(3 * round as u64));
        process.kill().and_then(|()| process.wait()).expect("a kill");
        runtime.block_on(async {
            let start = Instant::now();
            let job = Job::builder(config(&directory, 1_000_000, Arm::Every(2), model)).resume().await.expect("a job");
            let mut events = job.events();
            opening.push(start.elapsed().as_secs_f64());
            let mut last = Instant::now();
            let mut done = 0;
            while done < 4 {
                if let Event::Step(_) = events.recv().await.expect("an event") {
                    let list = if done == 0 { &mut stepping } else { &mut steps };
                    list.push(last.elapsed().as_secs_f64());
                    (last, done) = (Instant::now(), done + 1);
                }
            }
            job.stop();
            job.wait().await.expect("an outcome");
        });
    }
    let [opening, stepping, steps] = [opening, stepping, steps].map(|times| 1e3 * median(times));
    println!(
        "{RESTARTS} kills: {opening:.0} ms to open and load, {stepping:.0} ms to the next step; a step takes {steps:.0} ms"
    );
}

fn soak(runtime: &tokio::runtime::Runtime, steps: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("job");
    let config = config(&directory, steps, Arm::Every(50), "");
    let mut memory = Vec::new();
    let before = written();
    runtime.block_on(async {
        let job = Job::builder(config).start().await.expect("a job");
        let mut events = job.events();
        while let Ok(event) = events.recv().await {
            let Event::Step(summary) = event else { continue };
            if summary.step % 100 == 0 {
                memory.push((summary.step as f64, resident()));
            }
            if summary.step % (steps / 10).max(1) == 0 {
                let mb = |name: &str| size(&directory.join(name)) as f64 / 1e6;
                println!(
                    "step {:6}: {:.1} MB in all (store {:.1}, checkpoints {:.1}), {:.0} MB resident",
                    summary.step,
                    size(&directory) as f64 / 1e6,
                    mb("store"),
                    mb("checkpoints"),
                    resident()
                );
            }
            if summary.step == steps {
                break;
            }
        }
        job.wait().await.expect("an outcome");
    });
    println!("{:.1} KB written a step", (written() - before) / steps as f64 / 1e3);
    let late: Vec<_> = memory.into_iter().filter(|(step, _)| *step > 2000.0).collect();
    if late.len() > 2 {
        let (slope, half) = slope(&late);
        println!("resident memory after step 2000: {:+.3} ± {:.3} MB per 1,000 steps", slope * 1e3, half * 1e3);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let model = arguments.first().map_or("", String::as_str);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    if model == "soak" {
        return soak(&runtime, arguments.get(1).map_or(20_000, |n| n.parse().expect("a number of steps")));
    }
    if model == CHILD {
        return child(&runtime, Path::new(&arguments[1]), arguments.get(2).map_or("", String::as_str));
    }
    if model == "restart" {
        return restart(&runtime, arguments.get(1).map_or("", String::as_str));
    }
    let steps = arguments.get(1).map_or(100, |n| n.parse().expect("a number of steps"));
    let arms = [Arm::Never, Arm::Every(50), Arm::Every(10), Arm::Every(1), Arm::Share(0.035)];
    let mut times = vec![Vec::new(); arms.len()];
    let mut written = vec![(0, 0); arms.len()];
    let mut disks = Vec::new();
    for _ in 0..ROUNDS {
        disks.push(disk());
        for (i, arm) in arms.iter().enumerate() {
            let (seconds, checkpoints, bytes) = measure(&runtime, steps, *arm, model);
            times[i].push(seconds);
            written[i] = (checkpoints, bytes);
        }
    }
    println!("{steps} steps, {ROUNDS} alternations; the disk writes and syncs {:.0} MB/s (median)", median(disks));
    println!("{:16} {:>10} {:>10} {:>12} {:>14}", "checkpoints", "step, ms", "overhead", "checkpoints", "MB of each");
    for (i, arm) in arms.iter().enumerate() {
        let ratios = times[i].iter().zip(&times[0]).map(|(with, without)| with / without - 1.0).collect();
        let step = 1e3 * median(times[i].clone()) / steps as f64;
        let (checkpoints, bytes) = written[i];
        let each = bytes as f64 / 1e6 / checkpoints.max(1) as f64;
        println!("{:16} {step:>10.2} {:>9.1}% {checkpoints:>12} {each:>14.2}", arm.name(), 100.0 * median(ratios));
    }
}
