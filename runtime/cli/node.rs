//! `rehearsal node` and `rehearsal certificates`: other processes that generate for a job.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::print::{note, say};
use super::run::cancel_on_signal;
use crate::error::{Error, Result};
use crate::nodes::{Credentials, NodeEvent, NodeOptions, make_certificates, run_node};

#[derive(Args)]
#[command(after_help = "Examples:
  rehearsal certificates certificates trainer.example.org       once, on the coordinator
  rehearsal node --join trainer.example.org:7400 --authority certificates/authority.pem \\
      --certificate certificates/node.pem --key certificates/node.key

The job names the same authority, its own certificate and an address in its section [nodes]. A node may come and go at any time; Ctrl-C
or SIGTERM ends it after what it is at. docs/machines.md has the whole of it.")]
pub struct Node {
    /// Coordinator: host and port of `nodes.listen` of its job
    #[arg(long, value_name = "HOST:PORT")]
    join: String,
    /// Certificate of the authority that signed the coordinator's
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// Certificate of this node
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// Key of the node's certificate
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Name in messages; by default the machine's and the process's
    #[arg(long)]
    name: Option<String>,
    /// CPU threads; 0 takes one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Seconds that it tries to reach a coordinator that is not there, from its start or since it was last there
    #[arg(long, default_value_t = 600)]
    patience: u64,
}

/// Generates for a coordinator until a signal.
pub fn node(settings: Node) -> Result<ExitCode> {
    let Node { join, authority, certificate, key, name, threads, patience } = settings;
    let machine = std::env::var("HOSTNAME").or_else(|_| std::fs::read_to_string("/etc/hostname")).unwrap_or_default();
    let name = name.unwrap_or_else(|| format!("{}-{}", machine.trim(), std::process::id()));
    let credentials = Credentials { authority, certificate, key };
    let patience = Duration::from_secs(patience);
    let options = NodeOptions { join: join.clone(), name: name.clone(), credentials, threads, patience };
    let runtime = tokio::runtime::Runtime::new().map_err(Error::Threads)?;
    let (mut completions, mut waits) = (0, false);
    runtime.block_on(run_node(options, cancel_on_signal(), |event| match event {
        NodeEvent::Joined => {
            waits = false;
            say!("{name} has joined {join}");
        }
        NodeEvent::Delivered { completions: n, .. } => completions += n,
        NodeEvent::Waiting { reason } if !waits => {
            waits = true;
            note!("{join} is not there, and is tried again: {reason}");
        }
        NodeEvent::Waiting { .. } => {}
    }))?;
    say!("{completions} completions delivered");
    Ok(ExitCode::SUCCESS)
}

/// Makes an authority and certificates of both sides.
pub fn certificates(directory: &Path, hosts: &[String]) -> Result<ExitCode> {
    make_certificates(directory, hosts)?;
    say!("{} has certificates of an authority, a coordinator and nodes", directory.display());
    say!(
        "the coordinator needs authority.pem, coordinator.pem and coordinator.key; nodes need authority.pem, node.pem and node.key"
    );
    say!("authority.key signs further ones: keep it elsewhere");
    Ok(ExitCode::SUCCESS)
}
