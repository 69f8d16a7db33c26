//! Random deaths of the real program, over every algorithm: at random instants, at named calls of the system, while it opens,
//! resumes, exports and cleans up, out of memory, on a full disk, and by power cuts. `scripts/kills.sh` makes thousands.

mod cases;
pub mod disk;
mod power;
mod ways;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use rehearsal::lm::random::Stream;

use self::cases::{Case, Prepared};
use self::ways::{End, Way};
use crate::support::{Remains, number, rehearsal, stderr};

/// Numbers for one campaign, repeated by its seed.
pub struct Random {
    stream: Stream,
    drawn: u64,
}

impl Random {
    pub fn new(seed: u64, case: u64) -> Self {
        Self { stream: Stream::new(seed, case), drawn: 0 }
    }

    /// From 0 up to 1.
    pub fn share(&mut self) -> f64 {
        self.drawn += 1;
        self.stream.uniform(self.drawn)
    }

    /// From 0 up to `n`, without it.
    pub fn below(&mut self, n: usize) -> usize {
        (self.share() * n as f64) as usize
    }
}

fn seed() -> u64 {
    number("REHEARSAL_SEED", 1)
}

/// What one case saw.
#[derive(Default)]
struct Row {
    jobs: u32,
    deaths: BTreeMap<&'static str, u32>,
}

impl Row {
    fn total(&self) -> u32 {
        self.deaths.values().sum()
    }
}

/// Deaths that one job meets at most before it is left alone to end.
const DEATHS_A_JOB: u32 = 12;

/// Runs a case without interruption; what it leaves, and how long it took.
fn whole(case: &Case) -> (Vec<Remains>, Duration, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let job = case.prepare(folder.path());
    let start = Instant::now();
    let output = rehearsal(&["run", job.file.to_str().unwrap()]);
    assert!(output.status.success(), "{}: {}", case.name, stderr(&output));
    (remains(&job), start.elapsed(), folder)
}

/// What a job, or each stage of a chain, leaves behind.
fn remains(job: &Prepared) -> Vec<Remains> {
    match job.stages.is_empty() {
        true => vec![Remains::of(&job.directory)],
        false => job.stages.iter().map(|stage| Remains::of(&job.directory.join(stage))).collect(),
    }
}

/// Kills a case until it has died `deaths` times; every job must end as the whole one.
fn campaign(case: &Case, deaths: u32, index: u64) -> Row {
    let mut random = Random::new(seed(), index);
    let (want, time, kept) = whole(case);
    let mut row = Row::default();
    while row.total() < deaths {
        let folder = tempfile::tempdir().unwrap();
        let job = case.prepare(folder.path());
        row.jobs += 1;
        let mut died = 0;
        loop {
            let way = match died < DEATHS_A_JOB && row.total() < deaths {
                true => Way::pick(&mut random),
                false => Way::None,
            };
            let end = ways::run(&job, &way, time, &mut random);
            let context = format!("{}, seed {}, job {}, {way:?}", case.name, seed(), row.jobs);
            match end {
                End::Done => break,
                End::Died => {
                    died += 1;
                    *row.deaths.entry(way.name()).or_default() += 1;
                }
                End::Failed(stderr) => panic!("{context}: {stderr}"),
            }
            if random.below(4) == 0 && job.stages.is_empty() && ways::killed_beside(&job, &mut random) {
                *row.deaths.entry("export, verify, status").or_default() += 1;
            }
        }
        let got = remains(&job);
        for (got, want) in got.iter().zip(&want) {
            got.assert_same(want);
        }
        if job.stages.is_empty() {
            let model = |directory: &std::path::Path| std::fs::read(directory.join("model/model.safetensors")).unwrap();
            let whole = kept.path().join(job.directory.strip_prefix(folder.path()).unwrap());
            assert!(model(&job.directory) == model(&whole), "{}: the exported model differs", case.name);
        }
    }
    row
}

#[test]
fn random_deaths_change_nothing() {
    let cases = cases::all();
    let only = std::env::var("REHEARSAL_CASE").unwrap_or_default();
    let cases: Vec<&Case> = cases.iter().filter(|case| case.name.contains(&only)).collect();
    let deaths = number("REHEARSAL_KILLS", 2 * cases.len() as u64) as usize;
    let mut table = String::from("| job | jobs | deaths | how |\n| --- | --- | --- | --- |\n");
    let (mut jobs, mut total) = (0, 0);
    let start = Instant::now();
    for (i, case) in cases.iter().enumerate() {
        let share = deaths / cases.len() + usize::from(i < deaths % cases.len());
        let row = campaign(case, share as u32, i as u64);
        let how: Vec<String> = row.deaths.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let _ = writeln!(table, "| {} | {} | {} | {} |", case.name, row.jobs, row.total(), how.join(", "));
        eprintln!("{}: {} jobs, {} deaths after {:?}", case.name, row.jobs, row.total(), start.elapsed());
        (jobs, total) = (jobs + row.jobs, total + row.total());
    }
    println!("{table}| all | {jobs} | {total} | in {:.0} s, seed {} |", start.elapsed().as_secs_f64(), seed());
}
