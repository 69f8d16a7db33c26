//! `[metrics]`

use std::net::SocketAddr;

use crate::config::{Keys, Settings};
use crate::features::PROMETHEUS;

/// `[metrics]`
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MetricsSettings {
    /// Where Prometheus may scrape; `None` listens nowhere.
    pub listen: Option<SocketAddr>,
}

impl Settings for MetricsSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("metrics");
        s.speed().parsed(
            "listen",
            &mut self.listen,
            "an address with a port",
            "an address with a port, such as 127.0.0.1:9464",
            "Serve Prometheus metrics there, such as `127.0.0.1:9464`. Without it nothing listens.",
        );
        if self.listen.is_some() {
            s.requires("listen", PROMETHEUS.enabled, PROMETHEUS);
        }
    }
}
