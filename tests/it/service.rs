//! The example service: two jobs at once, read while they run, killed and started again.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rehearsal::Config;
use rehearsal::rewards::RuleSource;
use serde_json::{Value, json};

use crate::support::{PATIENCE, Remains, example, run};

struct Service {
    child: Child,
    url: String,
}

impl Service {
    fn start(folder: &Path) -> Self {
        let mut command = example("service");
        let mut child = command.arg("127.0.0.1:0").arg(folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("an address").to_string();
        Self { child, url }
    }

    fn get(&self, path: &str) -> (u16, Value) {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut response = agent.get(format!("{}{path}", self.url)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    }

    fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut response = agent.post(format!("{}{path}", self.url)).send_json(body).unwrap();
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    }

    fn metrics(&self) -> String {
        ureq::get(format!("{}/metrics", self.url)).call().unwrap().body_mut().read_to_string().unwrap()
    }

    /// Asks for a job's progress until `reached` is content with it.
    #[track_caller]
    fn wait(&self, job: u64, reached: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (status, progress) = self.get(&format!("/jobs/{job}"));
            if status == 200 && reached(&progress) {
                return;
            }
            assert!(Instant::now() < deadline, "{progress}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill(); // SIGKILL
        let _ = self.child.wait();
    }
}

const RULES: [&str; 2] = ["distinct_words", "ends_properly"];
const STEPS: u64 = 14;

#[test]
fn the_service_runs_two_jobs_is_killed_and_ends_them_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let jobs = folder.path().join("jobs");
    let service = Service::start(&jobs);
    for rule in RULES {
        let (status, reply) = service.post("/jobs", json!({"steps": STEPS, "rules": [rule]}));
        assert_eq!(status, 200, "{reply}");
    }
    let (status, reply) = service.post("/jobs", json!({"steps": STEPS, "rules": ["charm"]}));
    assert!(status == 400 && reply["error"].as_str().unwrap().contains("charm"), "{status} {reply}");
    assert_eq!(service.get("/jobs/9").0, 404);

    let step = |progress: &Value| progress["status"]["step"].as_u64().unwrap();
    service.wait(1, |progress| step(progress) >= 2);
    let (_, samples) = service.get("/jobs/1/samples");
    assert!(samples[0]["completions"][0].is_string() && samples[0]["scores"][0].is_number(), "{samples}");
    let (status, generated) = service.post("/jobs/2/generate", json!({"prompt": "What does the fox do?"}));
    assert!(status == 200 && !generated["text"].as_str().unwrap().is_empty(), "{generated}");
    let metrics = service.metrics();
    for job in ["job-1", "job-2"] {
        assert!(metrics.contains(&format!("rehearsal_steps_total{{job=\"{job}\"}}")), "{metrics}");
    }
    service.wait(2, |progress| step(progress) >= 3);
    drop(service);

    // The first is stopped by its client and goes on with the next start.
    let service = Service::start(&jobs);
    let (status, stopped) = service.post("/jobs/1/stop", json!({}));
    assert!(status == 200 && stopped["of"] == STEPS, "{stopped}");
    drop(service);
    let service = Service::start(&jobs);
    for job in [1, 2] {
        service.wait(job, |progress| step(progress) == STEPS && progress["running"] == false);
        let (status, generated) = service.post(&format!("/jobs/{job}/generate"), json!({"prompt": "What is it?"}));
        assert_eq!(status, 200, "{generated}");
    }
    drop(service);

    for (id, rule) in (1..).zip(RULES) {
        let whole = folder.path().join(format!("whole-{id}"));
        let mut config = Config::new(&whole);
        config.common.job.steps = STEPS;
        config.common.checkpoint.every_steps = 5;
        config.reward::<RuleSource>().unwrap().rules = vec![rule.into()];
        run(config).unwrap();
        Remains::of(&jobs.join(id.to_string())).assert_same(&Remains::of(&whole));
    }
}
