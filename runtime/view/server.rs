//! The HTTP server of the viewer.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::index::Filter;
use super::job::ShownJob;
use crate::access::{self, Control, JobReader, Overrule};
use crate::error::{Error, ErrorKind, Result};
use crate::listen::{self, Bound};
use crate::web::{self, Access, WebServer, asset};

/// The service, in errors.
pub(crate) const WHAT: &str = "the job viewer";

const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/view.css");
const SCRIPTS: [(&str, &str); 4] = [
    ("/view.js", include_str!("page/view.js")),
    ("/api.js", include_str!("page/api.js")),
    ("/charts.js", include_str!("page/charts.js")),
    ("/answers.js", include_str!("page/answers.js")),
];

/// Answers of one page at most.
const LIMIT_MAX: usize = 500;

/// The jobs that are shown.
pub struct Viewer {
    /// Directories of jobs, or of directories of jobs.
    directories: Vec<PathBuf>,
    jobs: Mutex<Vec<Arc<ShownJob>>>,
}

impl Viewer {
    /// Shows the jobs in directories: a directory of a job, or one whose folders are directories of jobs, such as those of the
    /// stages of a chain.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if a directory has no job, and the errors of reading it.
    pub fn of(directories: &[PathBuf]) -> Result<Self> {
        let viewer = Self { directories: directories.into(), jobs: Mutex::default() };
        for directory in directories {
            if access::jobs_in(directory)?.is_empty() {
                let message = format!("{} has no job; name the directory of a job, or of jobs", directory.display());
                return Err(Error::Usage(message));
            }
        }
        viewer.look()?;
        Ok(viewer)
    }

    /// Shows a job that this process runs.
    pub(crate) fn live(reader: JobReader) -> Self {
        Self { directories: Vec::new(), jobs: Mutex::new(vec![Arc::new(ShownJob::live(reader))]) }
    }

    /// The jobs, with those that have come since. A job keeps its place, which is its id.
    fn look(&self) -> Result<Vec<Arc<ShownJob>>> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        for directory in &self.directories {
            for path in access::jobs_in(directory)? {
                if jobs.iter().all(|job| job.directory() != path) {
                    jobs.push(Arc::new(ShownJob::of(&path)));
                }
            }
        }
        Ok(jobs.clone())
    }

    fn job(&self, id: usize) -> Result<Arc<ShownJob>> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.get(id).cloned().ok_or_else(|| Error::Usage(format!("there is no job {id}")))
    }
}

/// Serves the viewer on an address.
///
/// # Errors
///
/// [`Error::Listen`] if the address cannot be bound.
pub async fn serve(viewer: Viewer, address: SocketAddr, access: Access) -> Result<WebServer> {
    serve_on(listen::bind(WHAT, "--listen", address)?, viewer, access)
}

/// As [`serve`], on an address that is bound.
pub(crate) fn serve_on(bound: Bound, viewer: Viewer, access: Access) -> Result<WebServer> {
    let viewer = Arc::new(viewer);
    let mut files = Router::new()
        .route("/", asset("text/html; charset=utf-8", PAGE))
        .route("/view.css", asset("text/css; charset=utf-8", STYLE));
    for (path, script) in SCRIPTS {
        files = files.route(path, asset("text/javascript; charset=utf-8", script));
    }
    let api = Router::new()
        .route("/api/jobs", get(jobs))
        .route("/api/jobs/{id}/curves", get(curves))
        .route("/api/jobs/{id}/evaluations", get(evaluations))
        .route("/api/jobs/{id}/answers", get(answers))
        .route("/api/jobs/{id}/answers/{step}/{index}", get(answer))
        .route("/api/jobs/{id}/score", post(score))
        .route("/api/jobs/{id}/overrule", post(overrule))
        .route("/api/jobs/{id}/control", post(control))
        .with_state(viewer.clone());
    tokio::spawn(close_idle(Arc::downgrade(&viewer)));
    web::serve(WHAT, bound, access, files, api)
}

/// Closes stored jobs that nobody looks at, until the viewer is gone.
async fn close_idle(viewer: std::sync::Weak<Viewer>) {
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let Some(viewer) = viewer.upgrade() else { return };
        let jobs = viewer.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for job in jobs {
            job.close_if_idle().await;
        }
    }
}

type Jobs = State<Arc<Viewer>>;

async fn jobs(State(viewer): Jobs) -> Response {
    respond(async {
        let mut all = Vec::new();
        for job in crate::blocking::blocking(move || viewer.look()).await? {
            all.push(match job.glance().await {
                Ok(glance) => json!(glance),
                // One that is damaged, or was removed.
                Err(e) => json!({"directory": job.directory().display().to_string(), "error": e.to_string()}),
            });
        }
        Ok(json!(all))
    })
    .await
}

#[derive(Deserialize)]
struct After {
    #[serde(default)]
    after: u64,
}

async fn curves(State(viewer): Jobs, UrlPath(id): UrlPath<usize>, Query(After { after }): Query<After>) -> Response {
    respond(async { viewer.job(id)?.curves(after).await }).await
}

async fn evaluations(State(viewer): Jobs, UrlPath(id): UrlPath<usize>) -> Response {
    respond(async { viewer.job(id)?.evaluations().await }).await
}

/// Which page of the answers, and a part of their texts.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Page {
    text: String,
    offset: usize,
    limit: Option<usize>,
}

async fn answers(
    State(viewer): Jobs,
    UrlPath(id): UrlPath<usize>,
    Query(filter): Query<Filter>,
    Query(Page { text, offset, limit }): Query<Page>,
) -> Response {
    let limit = limit.unwrap_or(100).min(LIMIT_MAX);
    respond(async { viewer.job(id)?.answers(&filter, text.trim(), offset, limit).await }).await
}

async fn answer(State(viewer): Jobs, UrlPath((id, step, index)): UrlPath<(usize, u64, u32)>) -> Response {
    respond(async { viewer.job(id)?.answer(step, index).await }).await
}

#[derive(Deserialize)]
struct ScoreRequest {
    step: u64,
    index: u32,
    completion: usize,
}

async fn score(State(viewer): Jobs, UrlPath(id): UrlPath<usize>, Json(request): Json<ScoreRequest>) -> Response {
    let ScoreRequest { step, index, completion } = request;
    respond(async { Ok(json!(viewer.job(id)?.score(step, index, completion).await?)) }).await
}

async fn overrule(State(viewer): Jobs, UrlPath(id): UrlPath<usize>, Json(request): Json<Overrule>) -> Response {
    respond(async {
        viewer.job(id)?.overrule(request).await?;
        Ok(json!({}))
    })
    .await
}

#[derive(Deserialize)]
struct ControlRequest {
    action: Control,
}

async fn control(State(viewer): Jobs, UrlPath(id): UrlPath<usize>, Json(request): Json<ControlRequest>) -> Response {
    respond(async { Ok(json!({"step": viewer.job(id)?.control(request.action).await?})) }).await
}

/// The value, or the error with a status.
async fn respond(work: impl Future<Output = Result<Value>>) -> Response {
    match work.await {
        Ok(value) => Json(value).into_response(),
        Err(e) => {
            let status = match e.kind() {
                ErrorKind::Input => StatusCode::BAD_REQUEST,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, Json(json!({"error": e.to_string()}))).into_response()
        }
    }
}
