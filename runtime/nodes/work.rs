//! What the job and its nodes have in common.

use std::sync::Arc;

use rehearsal_lm::generate::{Completion, Request};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::futures::BoxFuture;

/// Generates completions in this process, with the weights that the work is for: each is sent when it ends.
pub type Generates = Arc<
    dyn Fn(
            Vec<Request>,
            UnboundedSender<Completion>,
            CancellationToken,
        ) -> BoxFuture<'static, rehearsal_actors::Result<()>>
        + Send
        + Sync,
>;

/// What nodes have done for a process.
pub struct Load {
    /// Nodes that have joined.
    pub nodes: usize,
    /// Completions of nodes that count.
    pub counted: u64,
    /// Completions that were leased again.
    pub again: u64,
    /// Bytes of weights that were asked for.
    pub bytes: u64,
}
