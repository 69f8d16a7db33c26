//! `[nodes]`: other processes that generate.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::{Keys, Range, Settings};
use crate::features::NODES;

/// Tokens of a completion at most that a node may generate: a completion is sent in one message.
pub const COMPLETION_TOKENS_MAX: usize = 400_000;

/// Files of one side: the certificate of the authority that both sides trust, and the side's own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// Certificate of the authority, in PEM.
    pub authority: PathBuf,
    /// Certificate that the authority signed, in PEM.
    pub certificate: PathBuf,
    /// Private key of that certificate, in PEM.
    pub key: PathBuf,
}

/// `[nodes]`: where other processes join to generate completions, on this machine or others. They change the speed, no result.
#[derive(Debug, Clone, PartialEq)]
pub struct NodesSettings {
    /// Address that nodes join at; `None` for no nodes.
    pub listen: Option<SocketAddr>,
    /// Certificate of the authority that signed the coordinator's and the nodes'.
    pub authority: Option<PathBuf>,
    /// The coordinator's certificate.
    pub certificate: Option<PathBuf>,
    /// Key of the coordinator's certificate.
    pub key: Option<PathBuf>,
    /// Whether the coordinator generates too.
    pub local: bool,
    /// Completions of a lease.
    pub completions_per_lease: usize,
    /// How long a lease lasts that is not renewed.
    pub lease: Duration,
    /// One lease of so many is checked.
    pub check_every: u64,
}

impl Default for NodesSettings {
    fn default() -> Self {
        Self {
            listen: None,
            authority: None,
            certificate: None,
            key: None,
            local: true,
            completions_per_lease: 16,
            lease: Duration::from_secs(10),
            check_every: 100,
        }
    }
}

impl NodesSettings {
    /// The coordinator's files; settings that were checked name all of them.
    pub fn credentials(&self) -> Credentials {
        let [authority, certificate, key] =
            [&self.authority, &self.certificate, &self.key].map(|path| path.clone().unwrap_or_default());
        Credentials { authority, certificate, key }
    }
}

impl Settings for NodesSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("nodes");
        s.speed().parsed(
            "listen",
            &mut self.listen,
            "an address such as \"0.0.0.0:7400\"",
            "an address with a port, such as \"0.0.0.0:7400\"",
            "Address that nodes (`rehearsal node --join HOST:PORT`) join at, to generate completions. They change the speed, no \
             result.",
        );
        if self.listen.is_some() {
            s.requires("listen", NODES.enabled, NODES);
        }
        let help =
            "Certificate of the authority that signed the coordinator's and the nodes' (`rehearsal certificates`).";
        s.speed().path("authority", &mut self.authority, help);
        s.speed().path("certificate", &mut self.certificate, "The coordinator's certificate.");
        s.speed().path("key", &mut self.key, "Key of the coordinator's certificate.");
        let missing = [("authority", &self.authority), ("certificate", &self.certificate), ("key", &self.key)];
        for (key, _) in missing.into_iter().filter(|(_, path)| self.listen.is_some() && path.is_none()) {
            s.problem(
                key,
                "is missing, which `nodes.listen` needs; `rehearsal certificates DIR HOST` makes all three files",
            );
        }
        let help = "Whether the coordinator generates too. Without it, it only checks nodes.";
        s.speed().flag("local", &mut self.local, help);
        let help = "Completions that a node is given at a time.";
        s.speed().integer("completions_per_lease", &mut self.completions_per_lease, Range::within(1.0, 4096.0), help);
        let help =
            "A node that is not heard of for so long loses its lease, and what it was to generate is leased again.";
        s.speed().seconds("lease_seconds", &mut self.lease, Range::within(1.0, 3600.0), help);
        let help = "One lease of so many, and each node's first, counts only when the coordinator has generated one of its completions \
                    with the same bits; a node with others is shut out.";
        s.speed().integer("check_every", &mut self.check_every, Range::from(1.0), help);
    }
}
