//! `rehearsal view`: serves the viewer of jobs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::print::say;
use super::run::cancel_on_signal;
use super::saved;
use crate::error::Result;
use crate::view::{Access, Viewer, serve};

#[derive(Args)]
#[command(after_help = "Examples:
  rehearsal view runs/quickstart              one job, running or not
  rehearsal view runs                         all jobs in a directory, also those that come later
  rehearsal view runs/a runs/b --listen 0.0.0.0:8766

On this machine anybody may read. Changes (pause, stop, overrule), and reading from beyond, need the token in the URL.")]
pub struct View {
    /// Directories of jobs, or directories whose folders are directories of jobs
    #[arg(required = true)]
    directories: Vec<PathBuf>,
    /// Address of the page
    #[arg(long, default_value = "127.0.0.1:8766")]
    listen: SocketAddr,
    /// Environment variable that holds the token; without it, one is generated
    #[arg(long)]
    token_env: Option<String>,
}

/// Serves the page until a signal.
pub fn view(settings: View) -> Result<ExitCode> {
    let View { directories, listen, token_env } = settings;
    let viewer = Viewer::of(&directories)?;
    let access = Access::from_env(listen, token_env.as_deref())?.with_token_to_change()?;
    saved::block_on(async {
        let server = serve(viewer, listen, access.clone()).await?;
        say!("viewer at {}; Ctrl-C ends it", access.url(server.address));
        cancel_on_signal().cancelled().await;
        Ok(ExitCode::SUCCESS)
    })
}
