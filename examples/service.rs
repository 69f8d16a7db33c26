//! A service that trains models on request: an axum server with several jobs in one process. Stop it by any means, `kill
//! -9` included, and start it again: its jobs go on, and end with the weights they would have had.
//!
//!     cargo run --features full --example service [ADDRESS [FOLDER]]
//!
//!     curl -d '{"steps": 40, "rules": ["distinct_words"]}' -H 'content-type: application/json' localhost:8080/jobs
//!     curl localhost:8080/jobs/1             # progress
//!     curl localhost:8080/jobs/1/samples     # the last scored completions and pairs
//!     curl -d '{"prompt": "What does the fox do?"}' -H 'content-type: application/json' localhost:8080/jobs/1/generate
//!     curl -X POST localhost:8080/jobs/1/stop
//!     curl localhost:8080/metrics            # of all jobs, by the label `job`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusRecorder;
use rehearsal::rewards::RuleSource;
use rehearsal::{Config, Devices, Error, Event, Generate, Job, JobBuilder, JobHandle, JobReader, exporter};
use serde::Deserialize;
use serde_json::{Value, json};

/// Samples that are kept of each job.
const SAMPLES: usize = 16;

struct Service {
    folder: PathBuf,
    /// One budget of threads for all jobs, and one recorder.
    devices: Devices,
    recorder: Arc<PrometheusRecorder>,
    jobs: Mutex<BTreeMap<u64, Running>>,
}

#[derive(Clone)]
struct Running {
    handle: JobHandle,
    samples: Arc<Mutex<Vec<Value>>>,
}

/// What a client may choose of a job.
#[derive(Deserialize)]
struct NewJob {
    steps: u64,
    rules: Vec<String>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: String,
    #[serde(default)]
    temperature: f64,
}

/// An error as an HTTP response.
struct Failure(StatusCode, String);

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let status = match e {
            Error::Config(_) | Error::Usage(_) => StatusCode::BAD_REQUEST,
            Error::NothingToResume(_) => StatusCode::NOT_FOUND,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, e.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(json!({"error": self.1}))).into_response()
    }
}

type Answer = Result<Json<Value>, Failure>;

impl Service {
    fn directory(&self, id: u64) -> PathBuf {
        self.folder.join(id.to_string())
    }

    fn running(&self, id: u64) -> Option<Running> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Starts or resumes a job and follows it.
    async fn start(&self, id: u64, job: JobBuilder) -> Result<(), Error> {
        let name = format!("job-{id}");
        let job = job.name(name).devices(self.devices.clone()).recorder(self.recorder.clone());
        let mut events = job.events();
        let running = Running { handle: job.start_or_resume().await?, samples: Arc::default() };
        let samples = running.samples.clone();
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).insert(id, running);
        tokio::spawn(async move {
            while let Ok(event) = events.recv().await {
                if let Event::Preferences { step, preferences } = event {
                    let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
                    samples.extend(preferences.iter().map(|p| {
                        json!({"step": step, "prompt": p.prompt, "completions": p.completions, "scores": p.scores, "pair": p.pair})
                    }));
                    let surplus = samples.len().saturating_sub(SAMPLES);
                    samples.drain(..surplus);
                }
            }
        });
        Ok(())
    }

    /// Goes on with the jobs of the folder that are not done.
    async fn resume_all(&self) -> Result<(), Box<dyn std::error::Error>> {
        std::fs::create_dir_all(&self.folder)?;
        for entry in std::fs::read_dir(&self.folder)? {
            let Ok(id) = entry?.file_name().to_string_lossy().parse::<u64>() else { continue };
            let directory = self.directory(id);
            if directory.join("job.toml").exists() && !directory.join("model").exists() {
                self.start(id, Job::saved(&directory)?).await?;
            }
        }
        Ok(())
    }

    /// Reads a job that runs or does not.
    async fn reader(&self, id: u64) -> Result<JobReader, Error> {
        match self.running(id) {
            Some(running) if !running.handle.is_ended() => Ok(running.handle.reader()),
            _ => JobReader::open(self.directory(id)).await,
        }
    }
}

async fn create(State(service): State<Arc<Service>>, Json(new): Json<NewJob>) -> Answer {
    // The directory is the job's claim on its number.
    let claim = |id: &u64| std::fs::create_dir(service.directory(*id)).is_ok();
    let id = (1..).find(claim).unwrap_or_default();
    let mut config = Config::new(service.directory(id));
    config.common.job.steps = new.steps;
    config.common.checkpoint.every_steps = 5;
    if let Some(rules) = config.reward::<RuleSource>() {
        rules.rules = new.rules;
    }
    match service.start(id, Job::builder(config)).await {
        Ok(()) => Ok(Json(json!({"id": id}))),
        Err(e) => {
            let _ = std::fs::remove_dir(service.directory(id)); // stays if something was written to it
            Err(e.into())
        }
    }
}

async fn status(State(service): State<Arc<Service>>, Path(id): Path<u64>) -> Answer {
    let reader = service.reader(id).await?;
    Ok(Json(json!({"running": reader.is_running(), "status": reader.status().await?})))
}

async fn samples(State(service): State<Arc<Service>>, Path(id): Path<u64>) -> Answer {
    let running = service.running(id).ok_or_else(|| Error::NothingToResume(service.directory(id)))?;
    let samples = running.samples.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(Json(json!(samples)))
}

async fn generate(State(service): State<Arc<Service>>, Path(id): Path<u64>, Json(prompt): Json<Prompt>) -> Answer {
    let request = Generate { temperature: prompt.temperature, ..Generate::new(prompt.prompt) };
    Ok(Json(json!(service.reader(id).await?.generate(request).await?)))
}

async fn stop(State(service): State<Arc<Service>>, Path(id): Path<u64>) -> Answer {
    let running = service.running(id).ok_or_else(|| Error::NothingToResume(service.directory(id)))?;
    running.handle.stop();
    match running.handle.wait().await {
        Ok(outcome) => Ok(Json(json!({"step": outcome.step, "of": outcome.steps}))),
        Err(e) => Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    rehearsal::use_one_arena();
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:8080".into());
    let folder = arguments.next().unwrap_or_else(|| "runs/service".into()).into();
    let recorder = Arc::new(exporter::recorder());
    let metrics = recorder.handle();
    let service = Arc::new(Service { folder, devices: Devices::new(0)?, recorder, jobs: Mutex::default() });
    service.resume_all().await?;
    let app = Router::new()
        .route("/jobs", post(create))
        .route("/jobs/{id}", get(status))
        .route("/jobs/{id}/samples", get(samples))
        .route("/jobs/{id}/generate", post(generate))
        .route("/jobs/{id}/stop", post(stop))
        .route("/metrics", get(move || std::future::ready(metrics.render())))
        .with_state(service);
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
