//! The job viewer: a page in the browser with the curves of jobs, their answers with scores and verdicts, and what a person may
//! do about a job. `rehearsal view` serves it for directories of jobs, and `[view]` within a running job.
//!
//! It reads jobs by the one way to read them, [`crate::JobReader`], and the files that a job writes for people:
//! `history.jsonl`, `evaluations.jsonl` and `status.json`. `curves.rs` and `index.rs` are what it keeps in memory, without disk or
//! network; `job.rs` reads one job, and `server.rs` is the HTTP server.

mod curves;
mod index;
mod job;
mod server;

#[cfg(feature = "cli")]
pub(crate) use curves::Curves;
pub use server::{Viewer, serve};
pub(crate) use server::{WHAT, serve_on};

pub use crate::web::{Access, WebServer};
