//! What a source of rewards is: settings, loading, and a scorer.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use dyn_clone::DynClone;
use rehearsal_actors::{ArchivistHandle, Devices, Placement, Reward};
use rehearsal_lm::{Checkpoint, Precision};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::config::Settings;
use crate::error::Result;
use crate::events::Event;
use crate::futures::BoxFuture;
use crate::metrics::Meters;
use crate::models::ModelCache;

/// A source of rewards: the settings of its section, from which it is loaded.
///
/// A new source implements this in a file of its own and is named in one line of the registry.
pub trait RewardSource: Settings + Any + DynClone + Debug + Send + Sync {
    /// The section or keys that configure it, as the fingerprint names it.
    fn name(&self) -> &'static str;

    /// Whether the configuration asks for it.
    fn is_configured(&self) -> bool;

    /// Whether a reward that the program brings takes its place.
    fn yields_to_host(&self) -> bool {
        false
    }

    /// Reads models and whatever else can fail before the job begins. Blocking.
    fn load(&self, inputs: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>>;
}
dyn_clone::clone_trait_object!(RewardSource);

/// What loading a source may use.
pub struct RewardInputs<'a> {
    /// Loads models, each once.
    pub models: &'a mut ModelCache,
    /// The model that is trained.
    pub policy: &'a Arc<Checkpoint>,
    /// Content that a resumed job must have in common, by name: a source adds the hashes of what it read.
    pub fingerprint: &'a mut Vec<(String, String)>,
    /// Reward models that were read, in order; the critic may start from the first.
    pub reward_models: &'a mut Vec<Arc<Checkpoint>>,
}

/// A source whose inputs are read.
pub trait LoadedReward: Send {
    /// Starts the scorer on the job's devices.
    fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>>;
}

/// What a starting source may use.
pub struct RewardContext {
    /// The job's devices.
    pub devices: Devices,
    /// Version of the arithmetic that the job was begun with.
    pub results: u32,
    /// Device of reward models and local judges.
    pub placement: Placement,
    /// Precision of reward models and local judges.
    pub dtype: Precision,
    /// Tokens that go through a model at a time.
    pub micro_batch_tokens: usize,
    /// The role that owns the job's store.
    pub archivist: ArchivistHandle,
    /// Where events are sent.
    pub events: broadcast::Sender<Event>,
    /// The job's metrics.
    pub(crate) meters: Arc<Meters>,
    /// Cancelled when the job is asked to stop.
    pub stop: CancellationToken,
}

/// A scorer with its weight in the job's reward.
pub struct StartedReward {
    /// Factor on its scores.
    pub weight: f64,
    /// The scorer.
    pub reward: Arc<dyn Reward>,
    /// Held as long as the job runs, such as a server.
    pub guard: Option<Box<dyn Any + Send + Sync>>,
}

impl StartedReward {
    /// A scorer that holds nothing else.
    pub fn new(weight: f64, reward: impl Reward) -> Self {
        Self { weight, reward: Arc::new(reward), guard: None }
    }
}
