//! Whether a job is ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a job is ready: its state is restored and it runs steps. Clones share the state; a new one is not ready.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Says that the job is ready, or no longer is.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    /// Whether the job is ready.
    pub fn is_ready(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
