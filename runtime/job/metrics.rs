//! Where a job's metrics go: to the host's recorder, to an endpoint of the job's own, or nowhere.

use std::net::SocketAddr;
use std::sync::Arc;

use metrics::Recorder;

use crate::error::Result;
#[cfg(feature = "prometheus")]
use crate::exporter;
#[cfg(feature = "prometheus")]
use crate::listen::{self, Bound};
use crate::metrics::{Meters, Metric};
use crate::readiness::Readiness;

/// A host's recorder.
pub type HostRecorder = Arc<dyn Recorder + Send + Sync>;

/// An address that a job will serve its metrics on, bound before the job writes anything.
pub struct MetricsAddress {
    #[cfg(feature = "prometheus")]
    bound: Option<Bound>,
}

impl MetricsAddress {
    /// Binds `metrics.listen`, if it is set and the host brings no recorder.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub fn bind(listen: Option<SocketAddr>, recorder: Option<&HostRecorder>) -> Result<Self> {
        let address = listen.filter(|_| recorder.is_none());
        // In a build without the exporter, the configuration has refused an address.
        #[cfg(not(feature = "prometheus"))]
        let _ = address;
        Ok(Self {
            #[cfg(feature = "prometheus")]
            bound: address.map(|address| listen::bind("metrics", "metrics.listen", address)).transpose()?,
        })
    }

    /// Registers the metrics, and serves them on the address.
    pub fn serve(
        self,
        recorder: Option<&HostRecorder>,
        declared: &[&'static Metric],
        job: Option<&str>,
        readiness: &Readiness,
    ) -> Result<JobMetrics> {
        #[cfg(feature = "prometheus")]
        if let Some(bound) = self.bound {
            let recorder = exporter::recorder();
            let meters = Arc::new(Meters::new(Some(&recorder), declared, job));
            let server = exporter::serve_on(bound, recorder.handle(), readiness.clone())?;
            return Ok(JobMetrics { meters, _server: Some(server) });
        }
        let _ = readiness; // only an endpoint shows it
        let meters = Arc::new(Meters::new(recorder.map(|r| &**r), declared, job));
        Ok(JobMetrics {
            meters,
            #[cfg(feature = "prometheus")]
            _server: None,
        })
    }
}

/// A job's metrics, served until they are dropped.
pub struct JobMetrics {
    pub meters: Arc<Meters>,
    #[cfg(feature = "prometheus")]
    _server: Option<exporter::Server>,
}
