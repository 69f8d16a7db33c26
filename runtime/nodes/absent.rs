//! What stands for nodes in a build without them, whose configuration refuses `nodes.listen`.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::{LoraInit, ModelSnapshot, Waits};
use rehearsal_lm::generate::{Completion, Options, Request};
use rehearsal_lm::{Checkpoint, Precision};
use tokio::sync::broadcast;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use super::settings::NodesSettings;
use super::work::{Generates, Load};
use crate::error::Result;
use crate::events::Event;

/// There is none.
pub enum Coordinator {}

impl Coordinator {
    pub fn start(
        _: &NodesSettings,
        _: &Checkpoint,
        _: (Precision, Option<LoraInit>),
        _: broadcast::Sender<Event>,
        _: Waits,
        _: Duration,
    ) -> Result<Option<Self>> {
        Ok(None)
    }

    pub fn load(&self) -> Load {
        match *self {}
    }

    pub async fn generate(
        &self,
        _: Arc<ModelSnapshot>,
        _: Vec<Request>,
        _: Options,
        _: &Generates,
        _: UnboundedSender<Completion>,
        _: &CancellationToken,
    ) -> Result<()> {
        match *self {}
    }
}
