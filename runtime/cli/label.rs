//! `rehearsal label`: serves the label page for the items of a file.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use rehearsal_store::Store;
use serde_json::json;

use super::print::say;
use super::run::cancel_on_signal;
use crate::data;
use crate::error::{At, Error, Result};
use crate::label::{Access, Item, LabelQueue, LabelService, LedgerLabels, items, serve};

/// Name of the directory's copy of the items.
const ITEMS: &str = "items.jsonl";

#[derive(Args)]
#[command(after_help = "Examples:
  rehearsal label labels --items answers.jsonl        start
  rehearsal label labels                              continue
  rehearsal label labels --listen 0.0.0.0:8765 --labels 2

A job trains on the labels by `data.train = [\"labels\"]`.")]
pub struct Label {
    /// Directory that keeps the labels; created if it does not exist
    directory: PathBuf,
    /// Items to label, needed the first time: a file of rows with `prompt` and `completions`, with `prompt`, `chosen`
    /// and `rejected`, or with `prompt` alone for a completion to be written; or a directory of a job, for the
    /// completions in its ledger
    #[arg(long, value_name = "FILE")]
    items: Option<PathBuf>,
    /// Address of the page
    #[arg(long, default_value = "127.0.0.1:8765")]
    listen: SocketAddr,
    /// Environment variable that holds the token which the page requires; without it, a token is generated unless the
    /// address is loopback
    #[arg(long)]
    token_env: Option<String>,
    /// Number of labellers that label each item
    #[arg(long, default_value_t = 1)]
    labels: usize,
}

/// Serves the page until a signal, then prints counts and agreement.
pub fn label(settings: Label) -> Result<ExitCode> {
    let Label { directory, items, listen, token_env, labels } = settings;
    let items = copied_items(&directory, items.as_deref())?;
    let (store, _) = Store::open(&directory)?;
    let (ledger, known) = LedgerLabels::open(store, items.clone()).map_err(Error::Usage)?;
    let service = Arc::new(LabelService::new(LabelQueue::new(labels), Box::new(ledger)));
    let rows = items.into_iter().zip(known).collect();
    service.add(rows).map_err(|reason| Error::Prompts { file: directory.join(ITEMS), message: reason })?;
    let access = Access::from_env(listen, token_env.as_deref())?;
    let runtime = tokio::runtime::Runtime::new().map_err(Error::Threads)?;
    runtime.block_on(async {
        let server = serve(service.clone(), listen, access.clone(), false).await?;
        say!("labelling at {}; every label is saved at once, and Ctrl-C ends the server", access.url(server.address));
        cancel_on_signal().cancelled().await;
        Ok::<_, Error>(())
    })?;
    let progress = service.progress();
    say!("\n{} of {} items done, {} skipped", progress.done, progress.items, progress.skipped);
    for (labeller, labels) in &progress.labellers {
        say!("  {labels:6} by {labeller}");
    }
    for (a, b, pairs, kappa) in &progress.agreement.cohen {
        say!("  Cohen's kappa of {a} and {b}: {kappa:.3} on {pairs} pairs");
    }
    if let Some(kappa) = progress.agreement.fleiss.filter(|_| progress.labellers.len() > 2) {
        say!("  Fleiss' kappa of all: {kappa:.3}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory's copy of the items; the first time, a copy of `file` is made.
fn copied_items(directory: &std::path::Path, file: Option<&std::path::Path>) -> Result<Vec<Item>> {
    let copy = directory.join(ITEMS);
    let old = if copy.exists() { Some(items::read(&copy)?) } else { None };
    let new = file.map(items::read).transpose()?;
    match (old, new) {
        (None, None) => {
            Err(Error::Usage(format!("{} has no items yet; name a file of items by --items", directory.display())))
        }
        (Some(old), Some(new)) if old != new => Err(Error::Usage(format!(
            "{} was started with other items; omit --items to continue with those, or name another directory",
            directory.display()
        ))),
        (Some(old), _) => Ok(old),
        (None, Some(new)) => {
            std::fs::create_dir_all(directory).at(directory)?;
            let row = |item: &Item| {
                let prompt = match &item.prompt {
                    rehearsal_store::Prompt::Text(text) => json!(text),
                    rehearsal_store::Prompt::Conversation(turns) => json!(turns),
                };
                match item.completions.as_slice() {
                    [] => json!({"prompt": prompt}),
                    texts => json!({"prompt": prompt, "completions": texts}),
                }
            };
            data::write(&new.iter().map(row).collect::<Vec<_>>(), &copy, &mut std::io::sink())?;
            Ok(new)
        }
    }
}
