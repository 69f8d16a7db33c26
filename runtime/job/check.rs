//! What would become of a job, without beginning it.

use rehearsal_actors::{Devices, Placement};
use rehearsal_store::Store;

use super::job::{Job, JobBuilder, load};
use super::metrics::MetricsAddress;
use super::view::ViewAddress;
use crate::blocking::blocking;
use crate::data::Dropped;
use crate::error::Result;
use crate::memory::MemoryBudget;

/// What a check of a job found. Everything that the job reads was read and every address bound; nothing was written.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Checked {
    /// Name of the algorithm.
    pub algorithm: &'static str,
    /// Parameters of the trained model.
    pub parameters: u64,
    /// Rows or prompts to train on.
    pub rows: usize,
    /// Rows that would be left out, by reason.
    pub dropped: Dropped,
    /// Steps of the job.
    pub steps: u64,
    /// Devices of its roles, each once.
    pub devices: Vec<Placement>,
    /// Memory that is predicted, if the algorithm says it and all roles are on the CPU.
    pub memory: Option<MemoryBudget>,
    /// The first rows as the model reads them, with special tokens; each a prompt, or its completions with their prompt.
    pub first: Vec<Vec<String>>,
    /// Whether the directory holds a job already: it can be resumed, and not begun.
    pub exists: bool,
}

impl JobBuilder {
    /// Does everything that a job does before it writes anything, and nothing more.
    ///
    /// # Errors
    ///
    /// Whatever the job would fail with before its first step, but for roles that cannot be started.
    pub async fn check(self) -> Result<Checked> {
        self.build()?.check().await
    }
}

impl Job {
    async fn check(self) -> Result<Checked> {
        let _bound = self.addresses()?;
        self.open_devices().await?;
        let (config, reward, kept) = (self.config.clone(), self.reward.is_some(), self.kept.clone());
        blocking(move || {
            let (_, loaded) = load(&config, reward, &kept.origin)?;
            let common = &config.common;
            let mut devices: Vec<Placement> = Vec::new();
            for placement in common.placement.all() {
                if !devices.contains(&placement) {
                    devices.push(placement);
                }
            }
            let model = &loaded.policy.architecture;
            Ok(Checked {
                algorithm: config.algorithm_name(),
                parameters: loaded.policy.parameters.values().map(|t| t.elem_count() as u64).sum(),
                rows: loaded.rows,
                dropped: loaded.dropped,
                steps: loaded.steps.unwrap_or(common.job.steps),
                devices,
                memory: config.algorithm.memory(common, model, loaded.prompt_tokens),
                first: loaded.first,
                exists: Store::exists(&common.job.directory),
            })
        })
        .await
    }

    /// Binds the addresses that the job will serve.
    pub(super) fn addresses(&self) -> Result<(MetricsAddress, ViewAddress)> {
        let common = &self.config.common;
        let metrics = MetricsAddress::bind(common.metrics.listen, self.recorder.as_ref())?;
        Ok((metrics, ViewAddress::bind(&common.view)?))
    }

    /// Opens the devices of all roles.
    pub(super) async fn open_devices(&self) -> Result<Devices> {
        let (placement, devices) = (self.config.common.placement.clone(), self.devices.clone());
        blocking(move || {
            let devices = devices.map_or_else(|| Devices::new(placement.shared_threads()), Ok)?;
            for placement in placement.all() {
                devices.open(placement)?;
            }
            Ok(devices)
        })
        .await
    }
}
