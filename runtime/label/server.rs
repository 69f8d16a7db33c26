//! HTTP server of the label page and its four API requests.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::queue::{ItemId, LabelValue};
use super::service::LabelService;
use crate::blocking::blocking;
use crate::error::Result;
use crate::listen::{self, Bound};
use crate::time::now_ms;
use crate::web::{self, Access, WebServer, asset};

/// The service, in errors.
pub(crate) const WHAT: &str = "the label page";

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

#[derive(Clone)]
struct AppState {
    service: Arc<LabelService>,
    /// Whether items may be added later, as a job does; the items of a file are all there at the start.
    live: bool,
}

/// Serves the label page of `service` on `address`. With `live`, the page waits for more items when the queue is empty.
///
/// # Errors
///
/// `Error::Listen` if the address cannot be bound.
pub async fn serve(service: Arc<LabelService>, address: SocketAddr, access: Access, live: bool) -> Result<WebServer> {
    serve_on(listen::bind(WHAT, "--listen", address)?, service, access, live)
}

/// As [`serve`], on an address that is bound.
pub(crate) fn serve_on(bound: Bound, service: Arc<LabelService>, access: Access, live: bool) -> Result<WebServer> {
    let files = Router::new()
        .route("/", asset("text/html; charset=utf-8", PAGE))
        .route("/page.js", asset("text/javascript; charset=utf-8", SCRIPT))
        .route("/page.css", asset("text/css; charset=utf-8", STYLE));
    let api = Router::new()
        .route("/api/next", get(next))
        .route("/api/label", post(submit))
        .route("/api/undo", post(undo))
        .route("/api/progress", get(progress))
        .with_state(AppState { service, live });
    web::serve(WHAT, bound, access, files, api)
}

#[derive(Deserialize)]
struct LabellerRequest {
    labeller: String,
}

/// A label: `ranks`, `text`, or neither to skip the item.
#[derive(Deserialize)]
struct SubmitRequest {
    labeller: String,
    item: ItemId,
    /// Rank of each completion, in the item's order.
    ranks: Option<Vec<u32>>,
    /// A demonstration.
    text: Option<String>,
}

async fn next(State(state): State<AppState>, Query(request): Query<LabellerRequest>) -> Response {
    let AppState { service, live, .. } = state;
    respond(move || Ok(json!({"item": service.next(&request.labeller, now_ms())?, "live": live}))).await
}

async fn submit(State(state): State<AppState>, Json(request): Json<SubmitRequest>) -> Response {
    respond(move || {
        let value = match (request.ranks, request.text) {
            (Some(ranks), None) => LabelValue::Ranks(ranks),
            (None, Some(text)) => LabelValue::Demonstration(text),
            (None, None) => LabelValue::Skipped,
            (Some(_), Some(_)) => return Err("the request has both `ranks` and `text`; send one of them".into()),
        };
        state.service.submit(&request.labeller, request.item, value, now_ms()).map(|()| json!({}))
    })
    .await
}

async fn undo(State(state): State<AppState>, Json(request): Json<LabellerRequest>) -> Response {
    respond(move || state.service.undo(&request.labeller, now_ms()).map(|()| json!({}))).await
}

async fn progress(State(state): State<AppState>) -> Response {
    respond(move || Ok(json!(state.service.progress()))).await
}

/// Runs `work` off the async threads, because it waits for the store. Responds with its value, or with its error and
/// status 409.
async fn respond(work: impl FnOnce() -> std::result::Result<Value, String> + Send + 'static) -> Response {
    match blocking(work).await {
        Ok(value) => Json(value).into_response(),
        Err(reason) => (StatusCode::CONFLICT, Json(json!({"error": reason}))).into_response(),
    }
}
