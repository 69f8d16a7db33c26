//! A node: joins a coordinator, and generates what it is given.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rehearsal_actors::{Devices, Director, ModelSnapshot, Placement, SamplerConfig, SamplerHandle};
use rehearsal_lm::Precision;
use rehearsal_lm::generate::{Completion, Request};
use tokio::sync::mpsc::unbounded_channel;
use tokio_util::sync::CancellationToken;

use super::client::{Answer, Coordinator, Failure};
use super::protocol::{Beat, Beaten, Bits, Delivery, Join, Joined, Lease};
use super::settings::Credentials;
use crate::error::{Error, Result};

/// How long the generation of a lease may take.
const GENERATION: Duration = Duration::from_secs(3600);

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The coordinator: a name or address with a port (`nodes.listen` of its job).
    pub join: String,
    /// Name in messages; unique among the nodes of a certificate.
    pub name: String,
    /// The node's certificate, and the authority that signed the coordinator's.
    pub credentials: Credentials,
    /// CPU threads; 0 for one for each core.
    pub threads: usize,
    /// How long it tries to reach a coordinator that is not there, from its start or since it was last there.
    pub patience: Duration,
}

/// What a node tells while it works.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeEvent {
    /// It has joined.
    Joined,
    /// It has delivered completions.
    Delivered {
        /// Number of completions.
        completions: usize,
        /// Version of the weights that sampled them.
        version: u64,
    },
    /// The coordinator is not there, and is tried again.
    Waiting {
        /// What failed.
        reason: String,
    },
}

/// Generates for a coordinator until `cancel` is cancelled; what it is at then is delivered first.
///
/// # Errors
///
/// [`Error::Usage`] if the coordinator refuses the node (another version, another kind of device, other bits) or a file cannot be
/// used, [`Error::Coordinator`] if the coordinator was not there for as long as the node's patience lasts.
pub async fn run_node(options: NodeOptions, cancel: CancellationToken, mut tell: impl FnMut(NodeEvent)) -> Result<()> {
    let coordinator = Coordinator::new(&options.join, &options.credentials)?;
    let mut seen = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        let mut there = |event| {
            (seen, pause) = (Instant::now(), Duration::from_millis(100));
            tell(event);
        };
        let reason = match session(&options, &coordinator, &cancel, &mut there).await {
            Ok(()) => return Ok(()),
            Err(Failure::Refused(reason)) => {
                return Err(Error::Usage(format!("the coordinator at {} refuses this node: {reason}", options.join)));
            }
            Err(Failure::Again(reason)) => reason,
        };
        if cancel.is_cancelled() {
            return Ok(());
        }
        if seen.elapsed() >= options.patience {
            let (join, seconds) = (options.join, options.patience.as_secs());
            return Err(Error::Coordinator { join, seconds, reason });
        }
        tell(NodeEvent::Waiting { reason });
        let _ = tokio::time::timeout(pause, cancel.cancelled()).await; // either will do
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Joins, and works until the node is to end or the coordinator is gone.
async fn session(
    options: &NodeOptions,
    coordinator: &Coordinator,
    cancel: &CancellationToken,
    tell: &mut impl FnMut(NodeEvent),
) -> Answer<()> {
    let join = Join { name: options.name.clone(), bits: Bits::here() };
    let Some(joined) = cancel.run_until_cancelled(coordinator.ask::<Joined>("join", &join)).await else {
        return Ok(());
    };
    let joined = joined?;
    let session = joined.session;
    let term = Duration::from_secs(joined.lease_seconds);
    // Weights may take longer than a lease.
    let worker = with_beats(coordinator, session, None, term, Worker::build(options, coordinator, joined)).await?;
    let mut worker = worker.ok_or_else(|| Failure::Again("the coordinator has forgotten this node".into()))?;
    tell(NodeEvent::Joined);
    loop {
        let asked = coordinator.ask::<Option<Lease>>("lease", &session);
        let Some(lease) = cancel.run_until_cancelled(asked).await else {
            return coordinator.tell("leave", &session).await;
        };
        let Some(lease) = lease? else { continue };
        let (id, version) = (lease.id, lease.weights.version);
        let work = worker.generate(coordinator, lease);
        let Some(completions) = with_beats(coordinator, session, Some(id), term, work).await? else { continue };
        let count = completions.len();
        coordinator.tell("deliver", &Delivery { session, lease: id, completions }).await?;
        tell(NodeEvent::Delivered { completions: count, version });
    }
}

/// Does some work, and says meanwhile that the node is there; `None` if its lease is over, which ends the work.
async fn with_beats<T>(
    coordinator: &Coordinator,
    session: u64,
    lease: Option<u64>,
    term: Duration,
    work: impl Future<Output = Answer<T>>,
) -> Answer<Option<T>> {
    tokio::pin!(work);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            done = &mut work => return done.map(Some),
            () = tokio::time::sleep(term / 4) => {}
        }
        match coordinator.ask::<Beaten>("beat", &Beat { session, lease }).await {
            Ok(Beaten { holds: true }) => heard = Instant::now(),
            Ok(Beaten { holds: false }) => return Ok(None),
            // The lease may outlast it.
            Err(Failure::Again(_)) if heard.elapsed() < term => {}
            Err(failure) => return Err(failure),
        }
    }
}

/// A sampler with the coordinator's model.
struct Worker {
    sampler: SamplerHandle,
    weights: Arc<ModelSnapshot>,
    _director: Director,
}

impl Worker {
    async fn build(options: &NodeOptions, coordinator: &Coordinator, joined: Joined) -> Answer<Self> {
        let Joined { files, start, bf16, lora, .. } = joined;
        let snapshot = coordinator.weights(&start).await?;
        let wrong = |e: rehearsal_actors::Error| Failure::Refused(e.to_string());
        let checkpoint = Arc::new(files.checkpoint(snapshot.tensors).map_err(wrong)?);
        let (restarts, _) = unbounded_channel();
        let director = Director::start(0, GENERATION, restarts).await.map_err(wrong)?;
        let config = SamplerConfig {
            placement: Placement::Cpu,
            threads: 0,
            precision: if bf16 { Precision::Bf16 } else { Precision::F32 },
            lora,
        };
        let devices = Devices::new(options.threads).map_err(wrong)?;
        let sampler = director.sampler(checkpoint, config, devices).await.map_err(wrong)?;
        // No weights have this version.
        let weights = Arc::new(ModelSnapshot { version: u64::MAX, ..ModelSnapshot::default() });
        Ok(Self { sampler, weights, _director: director })
    }

    async fn generate(&mut self, coordinator: &Coordinator, lease: Lease) -> Answer<Vec<Completion>> {
        if self.weights.version != lease.weights.version {
            self.weights = Arc::new(coordinator.weights(&lease.weights).await?);
        }
        let requests = lease.prompts.into_iter().flat_map(|(prompt, ids)| {
            let prompt = Arc::new(prompt);
            ids.into_iter().map(move |id| Request { id, prompt: prompt.clone() })
        });
        let (finished, mut completions) = unbounded_channel();
        // Dropped with this future, it ends the generation of a lease that is over.
        let cancel = CancellationToken::new();
        let _guard = cancel.clone().drop_guard();
        let generated =
            self.sampler.generate(self.weights.clone(), requests.collect(), lease.options, finished, cancel).await;
        generated.map_err(|e| Failure::Again(e.to_string()))?;
        let mut all = Vec::new();
        while let Ok(completion) = completions.try_recv() {
            all.push(completion);
        }
        Ok(all)
    }
}
