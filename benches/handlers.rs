//! What two jobs cost the requests of the service that runs them: p50 and p99 of a handler, without jobs, beside two jobs
//! that share devices, and beside two that do not.
//!
//!     cargo bench --features prometheus --bench handlers

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use rehearsal::rewards::RuleSource;
use rehearsal::{Config, Devices, Job, JobHandle};

/// Requests of one measurement, and the pause before each.
const REQUESTS: usize = 1500;
const PAUSE: Duration = Duration::from_millis(2);

/// Milliseconds of each request, sorted.
fn measure(address: SocketAddr) -> Vec<f64> {
    let mut stream = TcpStream::connect(address).expect("the server");
    stream.set_nodelay(true).expect("a socket");
    let mut one = || {
        std::thread::sleep(PAUSE);
        let start = Instant::now();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("a request");
        let (mut answer, mut buffer) = (Vec::new(), [0; 1024]);
        while !answer.ends_with(b"ok") {
            let read = stream.read(&mut buffer).expect("an answer");
            assert!(read > 0, "the server closed the connection");
            answer.extend_from_slice(&buffer[..read]);
        }
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut all: Vec<f64> = (0..REQUESTS).map(|_| one()).collect();
    all.sort_by(f64::total_cmp);
    all
}

fn show(name: &str, sorted: &[f64]) {
    let at = |share: f64| sorted[(share * (sorted.len() - 1) as f64) as usize];
    println!("{name:32} p50 {:7.3} ms   p99 {:7.3} ms   worst {:7.3} ms", at(0.5), at(0.99), at(1.0));
}

async fn job(directory: std::path::PathBuf, devices: Option<Devices>) -> JobHandle {
    let mut config = Config::new(directory);
    config.common.job.steps = 1_000_000;
    config.common.checkpoint.every_steps = 1000;
    config.reward::<RuleSource>().expect("a source of every configuration").rules = vec!["distinct_words".into()];
    let job = Job::builder(config);
    let job = match devices {
        Some(devices) => job.devices(devices),
        None => job,
    };
    job.start().await.expect("a job")
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let address = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/", get(async || "ok"))).await });
        address
    });
    show("no job", &measure(address));
    let shared = Devices::new(0).expect("devices");
    for (name, devices) in [("two jobs that share devices", Some(shared)), ("two jobs with threads each", None)] {
        let jobs: Vec<JobHandle> =
            (0..2).map(|i| runtime.block_on(job(folder.path().join(format!("{name} {i}")), devices.clone()))).collect();
        show(name, &measure(address));
        for job in jobs {
            job.stop();
            runtime.block_on(job.wait()).expect("an outcome");
        }
    }
}
