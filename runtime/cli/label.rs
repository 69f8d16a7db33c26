//! `rehearsal label`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use rehearsal_store::Store;
use serde_json::json;

use super::run::on_signal;
use crate::data::write;
use crate::error::{At, Error, Result};
use crate::label::{Access, Board, Desk, Item, LedgerBook, items, serve};

/// A copy of what is labelled, in the directory.
const ITEMS: &str = "items.jsonl";

#[derive(Args)]
pub struct Label {
    /// Where verdicts are kept; made where there is none. Jobs learn from it by `data.train = ["DIR"]`.
    directory: PathBuf,
    /// What to label: rows with `prompt` and `completions`, or `chosen` and `rejected`, or a prompt alone, for which the
    /// labeller writes the answer. Or a job's directory: the answers in its ledger. Needed once.
    #[arg(long)]
    items: Option<PathBuf>,
    /// Where the page is served.
    #[arg(long, default_value = "127.0.0.1:8765")]
    listen: SocketAddr,
    /// Environment variable with a token, without which nobody gets in; beyond this machine one is made anyway.
    #[arg(long)]
    token_env: Option<String>,
    /// Labellers that every item wants.
    #[arg(long, default_value_t = 1)]
    labels: usize,
}

pub fn label(settings: Label) -> Result<ExitCode> {
    let Label { directory, items, listen, token_env, labels } = settings;
    let items = kept_items(&directory, items.as_deref())?;
    let (store, _) = Store::open(&directory)?;
    let (book, known) = LedgerBook::open(store, items.clone()).map_err(Error::Usage)?;
    let desk = Arc::new(Desk::new(Board::new(labels), Box::new(book)));
    let rows = items.into_iter().zip(known).collect();
    desk.add(rows).map_err(|reason| Error::Prompts { file: directory.join(ITEMS), message: reason })?;
    let access = Access::from_env(listen, token_env.as_deref())?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| Error::State(e.to_string()))?;
    runtime.block_on(async {
        let served = serve(desk.clone(), listen, access.clone(), false).await?;
        println!("labelling at {}; Ctrl-C ends it, and every verdict is kept", access.url(served.address));
        on_signal().cancelled().await;
        Ok::<_, Error>(())
    })?;
    let progress = desk.progress();
    println!("\n{} of {} items done, {} skipped", progress.done, progress.items, progress.skipped);
    for (labeller, labels) in &progress.labellers {
        println!("  {labels:6} by {labeller}");
    }
    for (a, b, pairs, kappa) in &progress.agreement.cohen {
        println!("  Cohen's kappa of {a} and {b}: {kappa:.3} on {pairs} pairs");
    }
    if let Some(kappa) = progress.agreement.fleiss.filter(|_| progress.labellers.len() > 2) {
        println!("  Fleiss' kappa of all: {kappa:.3}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The items of the directory; those of a file, the first time.
fn kept_items(directory: &std::path::Path, file: Option<&std::path::Path>) -> Result<Vec<Item>> {
    let kept = directory.join(ITEMS);
    let old = if kept.exists() { Some(items::read(&kept)?) } else { None };
    let new = file.map(items::read).transpose()?;
    match (old, new) {
        (None, None) => {
            Err(Error::Usage(format!("{} has nothing to label yet; name a file by --items", directory.display())))
        }
        (Some(old), Some(new)) if old != new => Err(Error::Usage(format!(
            "{} was started with other items; leave --items out to go on, or name another directory",
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
            write::write(&new.iter().map(row).collect::<Vec<_>>(), &kept, &mut std::io::sink())?;
            Ok(new)
        }
    }
}
