//! A real Prometheus scrapes a running job: every expression of the dashboard and the alert rules works.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::edit::replace_once;
use crate::support::parts::{Part, skip};
use crate::support::{PATIENCE, free_port, job_file, program, rehearsal, stderr};

/// Expressions that may be empty on a healthy job, each with its reason.
const MAY_BE_EMPTY: [(&str, &str); 2] =
    [("ALERTS", "no alert fires on a healthy job"), ("judge_seconds", "the job has no judge")];

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn deploy(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(file)
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        skip(Part::Prometheus, format_args!("{program} is not installed (Debian: apt-get install prometheus)"));
    }
    found
}

/// The body of an answer to `GET path`.
fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_string())
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn query(port: u16, expression: &str) -> Result<usize, String> {
    let body = get(port, &format!("/api/v1/query?query={}", encode(expression))).ok_or("no answer")?;
    let json: Value = serde_json::from_str(&body).map_err(|e| format!("{e}: {body}"))?;
    if json["status"] != "success" {
        return Err(body);
    }
    Ok(json["data"]["result"].as_array().map_or(0, Vec::len))
}

/// Every `expr` of the dashboard, with its variables filled in.
fn dashboard_expressions() -> BTreeSet<String> {
    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(expr)) = map.get("expr") {
                    found.insert(expr.replace("$__rate_interval", "15s").replace("$instance", ".*"));
                }
                map.values().for_each(|v| collect(v, found));
            }
            Value::Array(list) => list.iter().for_each(|v| collect(v, found)),
            _ => {}
        }
    }
    let text = std::fs::read_to_string(deploy("grafana-dashboard.json")).unwrap();
    let mut found = BTreeSet::new();
    collect(&serde_json::from_str(&text).unwrap(), &mut found);
    found
}

/// Every `expr:` of the alert rules, without the comparison that makes them fire.
fn alert_expressions() -> Vec<String> {
    let text = std::fs::read_to_string(deploy("alerts.yml")).unwrap();
    text.lines().filter_map(|l| l.trim().strip_prefix("expr: ")).map(String::from).collect()
}

#[test]
fn the_deployed_files_pass_promtool() {
    if !installed("promtool") {
        return;
    }
    for args in [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"]] {
        let output = Command::new("promtool").args(&args[..2]).arg(deploy(args[2])).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let mut test = Command::new("promtool");
    let output = test.args(["test", "rules"]).arg(deploy("alerts-test.yml")).current_dir(deploy("")).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A job that steps until it is dropped, and the port of its metrics.
fn running_job(folder: &Path) -> (Killed, u16) {
    let port = free_port();
    let more = format!(
        "\n[checkpoint]\nevery_steps = 10\n\n[evaluation]\nevery_steps = 20\nprompts = 4\n\n[metrics]\nlisten = \"127.0.0.1:{port}\"\n"
    );
    let (file, _) = job_file(folder, 1_000_000, &more);
    let job = program().args(["run", file.to_str().unwrap()]).stdout(Stdio::null()).spawn().unwrap();
    (Killed(job), port)
}

#[test]
fn a_running_job_is_healthy_and_becomes_ready() {
    let folder = tempfile::tempdir().unwrap();
    let (_job, port) = running_job(folder.path());
    let deadline = Instant::now() + Duration::from_secs(90);
    while get(port, "/readyz").as_deref() != Some("ready\n") {
        assert!(Instant::now() < deadline, "the job is not ready: {:?}", get(port, "/readyz"));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(get(port, "/healthz").as_deref(), Some("ok\n"));
}

#[test]
fn a_job_whose_port_is_busy_says_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (file, _) = job_file(folder.path(), 1, &format!("\n[metrics]\nlisten = \"{address}\"\n"));
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    let error = stderr(&output);
    assert!(
        !output.status.success() && error.contains(&address.to_string()) && error.contains("`metrics.listen`"),
        "{error}"
    );
}

#[test]
fn a_real_prometheus_answers_every_expression_of_a_running_job() {
    if !installed("prometheus") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let own = free_port();
    let (_job, port) = running_job(folder.path());

    // The deployed configuration, on this test's ports and scraping faster.
    let deployed = std::fs::read_to_string(deploy("prometheus.yml")).unwrap();
    let settings = [
        ("[\"127.0.0.1:9464\"]", format!("[\"127.0.0.1:{port}\"]")),
        ("scrape_interval: 5s", "scrape_interval: 1s".into()),
        ("evaluation_interval: 5s", "evaluation_interval: 1s".into()),
        ("- alerts.yml", format!("- {}", deploy("alerts.yml").display())),
    ]
    .iter()
    .fold(deployed, |text, (from, to)| replace_once(&text, from, to));
    let settings_file = folder.path().join("prometheus.yml");
    std::fs::write(&settings_file, settings).unwrap();
    let _prometheus = Killed(
        Command::new("prometheus")
            .arg(format!("--config.file={}", settings_file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{own}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );

    let deadline = Instant::now() + PATIENCE;
    // Until there are rates to compute and an evaluation and a checkpoint have happened.
    let ready = "count_over_time(rehearsal_steps_total[1m]) > 8 and rehearsal_held_out_kl != 0 and rehearsal_checkpoint_step > 0";
    while !query(own, ready).is_ok_and(|n| n > 0) {
        assert!(Instant::now() < deadline, "the job was not scraped: {:?}", query(own, "rehearsal_steps_total"));
        std::thread::sleep(Duration::from_millis(300));
    }

    let expressions = dashboard_expressions();
    assert!(expressions.len() > 15);
    for expression in &expressions {
        let may_be_empty = MAY_BE_EMPTY.iter().any(|(name, _)| expression.contains(name));
        // A rate needs two scrapes of the last moments, which a busy machine may come to late.
        while query(own, expression).unwrap_or_else(|e| panic!("{expression}: {e}")) == 0 && !may_be_empty {
            assert!(Instant::now() < deadline, "`{expression}` has no data");
            std::thread::sleep(Duration::from_millis(300));
        }
    }
    let alerts = alert_expressions();
    assert!(alerts.len() >= 6);
    for expression in &alerts {
        query(own, expression).unwrap_or_else(|e| panic!("{expression}: {e}"));
        // A rule compares; what it compares must be there.
        let compared =
            expression.split([' ', '(', ')', '[', '{', '=']).find(|w| w.starts_with("rehearsal_") || *w == "up");
        let metric = compared.unwrap_or_else(|| panic!("{expression} names no metric"));
        assert!(query(own, metric).unwrap() > 0, "`{metric}` of an alert has no data");
    }
    let loaded = get(own, "/api/v1/rules").unwrap();
    assert!(loaded.contains("RehearsalStalled") && !loaded.contains("\"health\":\"err\""), "{loaded}");

    // Every metric of the table is there, under its name and kind.
    let text = get(port, "/metrics").unwrap();
    for metric in rehearsal::Algorithms::default().metrics() {
        let name = metric.exported_name();
        let kind = format!("{:?}", metric.kind).to_lowercase();
        assert!(text.contains(&format!("# TYPE {name} {kind}")), "{name} is not exported");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} is not described");
    }
}
