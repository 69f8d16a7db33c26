//! The job's side: completions of a step by nodes and by the coordinator itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rehearsal_actors::{LoraInit, ModelFiles, ModelSnapshot, Waits};
use rehearsal_lm::generate::{Completion, Options, Request};
use rehearsal_lm::{Checkpoint, Precision};
use tokio::sync::broadcast;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use super::leases::{Leases, Local, News};
use super::server::{Base, Server, Shared, bind, serve};
use super::settings::NodesSettings;
use super::weights::Weights;
use super::work::{Generates, Load};
use crate::error::{Error, Result};
use crate::events::{Event, tell};

/// Time between two looks for leases that are over.
const TICK: Duration = Duration::from_millis(250);

/// Where nodes join, and what they are given.
pub struct Coordinator {
    shared: Arc<Shared>,
    server: Server,
    local: Local,
    events: broadcast::Sender<Event>,
    waits: Waits,
    /// How long it waits for nodes, where it generates nothing itself.
    patience: Duration,
}

impl Coordinator {
    /// Serves nodes by the settings, if they name an address.
    pub fn start(
        settings: &NodesSettings,
        model: &Checkpoint,
        (precision, lora): (Precision, Option<LoraInit>),
        events: broadcast::Sender<Event>,
        waits: Waits,
        patience: Duration,
    ) -> Result<Option<Self>> {
        let Some(address) = settings.listen else { return Ok(None) };
        let bound = bind(address)?;
        let lora = lora.map(|start| start.without_directory(model)).transpose()?;
        let start = ModelSnapshot { tensors: model.parameters.clone(), ..ModelSnapshot::default() };
        let base = Base {
            files: ModelFiles::of(model),
            start: Weights::new(&start)?,
            bf16: precision == Precision::Bf16,
            lora,
            lease: settings.lease,
        };
        let leases = Leases::new(settings.lease, settings.completions_per_lease, settings.check_every);
        let shared = Arc::new(Shared::new(leases, base));
        let server = serve(bound, &settings.credentials(), shared.clone())?;
        let local = if settings.local { Local::Share } else { Local::Checks };
        tell(&events, Event::NodesWanted { address: server.address });
        Ok(Some(Self { shared, server, local, events, waits, patience }))
    }

    /// What nodes have done so far.
    pub fn load(&self) -> Load {
        let leases = self.shared.leases();
        Load { nodes: leases.nodes(), counted: leases.counted, again: leases.again, bytes: self.shared.bytes() }
    }

    /// Generates completions with weights of the policy, and sends each to `finished` when it counts. `here` generates in this
    /// process with the same weights.
    ///
    /// # Errors
    ///
    /// [`rehearsal_actors::Error::Cancelled`] once `cancel` is cancelled, [`Error::Nodes`] if no node comes for so long as the
    /// coordinator waits, or if completions that were logged are found to be wrong, and the errors of `here`.
    pub async fn generate(
        &self,
        weights: Arc<ModelSnapshot>,
        requests: Vec<Request>,
        options: Options,
        here: &Generates,
        finished: UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        // The bytes are copied and hashed, which takes a while for large models.
        let weights = crate::blocking::blocking(move || Weights::new(&weights)).await?;
        let work = self.shared.change(|leases| leases.add(Arc::new(weights), options, requests, finished));
        let result = self.finish(work, here, cancel).await;
        self.shared.change(|leases| leases.remove(work));
        self.tell_news();
        result
    }

    async fn finish(&self, work: u64, here: &Generates, cancel: &CancellationToken) -> Result<()> {
        let mut progress = Instant::now();
        loop {
            let changed = self.shared.changed();
            let (done, wrong, nodes) = {
                let mut leases = self.shared.leases();
                leases.expire(Instant::now());
                (leases.is_done(work), leases.take_wrong(), leases.nodes())
            };
            self.tell_news();
            if let Some(reason) = wrong {
                return Err(Error::Nodes(format!(
                    "{reason}; the step's log has wrong completions: mend or leave out the node, remove the job's directory, and start it again"
                )));
            }
            if done {
                return Ok(());
            }
            if cancel.is_cancelled() {
                return Err(rehearsal_actors::Error::Cancelled.into());
            }
            let requests = self.shared.leases().take_local(work, self.local);
            if requests.is_empty() {
                let _wait = self.waits.enter("nodes", "completions");
                let _ = tokio::time::timeout(TICK, changed).await; // either will do
                if nodes > 0 {
                    progress = Instant::now();
                } else if progress.elapsed() >= self.patience {
                    let seconds = self.patience.as_secs();
                    return Err(Error::Nodes(format!(
                        "no node has joined at {} for {seconds} s, and `nodes.local` is false; start `rehearsal node --join`",
                        self.server.address
                    )));
                }
                continue;
            }
            progress = Instant::now();
            self.generate_here(work, requests, here, cancel).await?;
        }
    }

    /// Generates some completions here. Nodes that were silent meanwhile lose their leases.
    async fn generate_here(
        &self,
        work: u64,
        requests: Vec<Request>,
        here: &Generates,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let (sender, mut completions) = unbounded_channel();
        let ids = requests.iter().map(|r| r.id).collect();
        let generating = tokio::spawn(here(requests, sender, cancel.clone()));
        loop {
            match tokio::time::timeout(TICK, completions.recv()).await {
                Ok(Some(completion)) => self.shared.change(|leases| leases.deliver_local(work, completion)),
                Ok(None) => break,
                Err(_) => {
                    self.shared.change(|leases| leases.expire(Instant::now()));
                    self.tell_news();
                }
            }
        }
        let result = generating.await;
        self.shared.change(|leases| leases.give_back(work, ids));
        Ok(result.map_err(|e| Error::Internal(format!("generation: {e}")))??)
    }

    fn tell_news(&self) {
        let all = self.shared.leases().take_news();
        for news in all {
            let (node, what) = match news {
                News::Joined { node } => (node, "joined".to_string()),
                News::Left { node } => (node, "left".to_string()),
                News::Lost { node, completions } => {
                    let what = format!("was not heard of; {completions} completions that it had are generated again");
                    (node, what)
                }
                News::Excluded { node, reason } => (node, format!("is shut out: {reason}")),
            };
            tracing::info!("node {node} {what}");
            tell(&self.events, Event::Node { node, what });
        }
    }
}
