//! Starts a job: its roles, then its run.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::Devices;
use serde_json::Value;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::algorithm::{Algorithm, LoadedAlgorithm};
use super::command::Command;
use super::interval::Interval;
use super::journal::Journal;
use super::loader::Loaded;
use super::roles::Roles;
use super::run::Run;
use super::starter::Starter;
use super::state::JobState;
use crate::error::Result;
use crate::events::Event;
use crate::metrics::Meters;
use crate::readiness::Readiness;
use crate::rewards::{HostScores, RewardContext};
use crate::settings::Common;
use crate::status::JobStatus;

/// What a job is started from.
pub struct Setup {
    pub common: Common,
    /// Name of the algorithm.
    pub algorithm: &'static str,
    pub roles: Roles,
    pub loaded: Loaded,
    /// The host's reward, which takes the place of rules.
    pub host: Option<HostScores>,
    pub devices: Devices,
    /// Version of the arithmetic that the job was begun with.
    pub results: u32,
    pub meters: Arc<Meters>,
    pub readiness: Readiness,
    pub events: broadcast::Sender<Event>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    pub status: watch::Sender<JobStatus>,
    pub cancel: CancellationToken,
}

/// Starts the roles of an algorithm.
pub async fn start(setup: Setup, algorithm: Box<dyn LoadedAlgorithm>) -> Result<(Run, Box<dyn Algorithm>)> {
    let Setup { common, algorithm: name, mut roles, loaded, host, devices, results, meters, readiness, .. } = setup;
    let Setup { events, commands, status, cancel, .. } = setup;
    let (mut guards, mut budget) = (Vec::new(), None);
    let context = RewardContext {
        devices: devices.clone(),
        results,
        placement: common.placement.reward(),
        dtype: common.model.dtype,
        micro_batch_tokens: common.optimizer.micro_batch_tokens,
        archivist: roles.archivist.clone(),
        events: events.clone(),
        meters: meters.clone(),
        stop: cancel.clone(),
    };
    let Loaded { policy, rewards, rows, dropped, prompt_tokens, .. } = loaded;
    let mut starter = Starter {
        common: &common,
        roles: &mut roles,
        devices,
        host,
        rewards,
        context,
        guards: &mut guards,
        budget: &mut budget,
        model: policy.clone(),
        prompt_tokens,
    };
    let algorithm = algorithm.start(&mut starter).await?;
    let interval = Interval::new(common.checkpoint);
    let run = Run {
        journal: Journal::new(&common.job.directory, roles.director.waits(), common.limits.request),
        common,
        algorithm: name,
        state: JobState::default(),
        model: policy,
        cancel,
        roles,
        dropped,
        rows,
        meters,
        readiness,
        events,
        commands,
        status,
        mid_step: false,
        skipped: 0,
        staleness: None,
        restarts_restored: 0,
        saved: None,
        interval,
        begun: Duration::ZERO,
        writing: None,
        last: Value::Null,
        done: false,
        budget,
        _guards: guards,
    };
    Ok((run, algorithm))
}
