//! What a process holds after many jobs: resident memory after each twentieth resume of a finished job.
//!
//!     cargo bench --bench resumes                # the C library's default
//!     cargo bench --bench resumes -- one-arena   # after `rehearsal::use_one_arena()`

use rehearsal::rewards::RuleSource;
use rehearsal::{Config, Job};

/// Resident memory of this process in MB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().expect("a number") / 1024.0
}

fn main() {
    if std::env::args().any(|argument| argument == "one-arena") {
        rehearsal::use_one_arena();
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = Config::new(folder.path().join("job"));
    config.common.job.steps = 2;
    config.reward::<RuleSource>().expect("a source of every configuration").rules = vec!["distinct_words".into()];
    for resumes in 0..=60 {
        let outcome = runtime.block_on(async {
            let job = Job::builder(config.clone()).start_or_resume().await.expect("a job");
            job.wait().await
        });
        assert_eq!(outcome.expect("an outcome").step, 2);
        if resumes % 20 == 0 {
            println!("after {resumes:2} resumes: {:.0} MB", resident());
        }
    }
}
