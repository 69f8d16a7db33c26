//! Cargo features of this crate, for messages of builds that lack one.

use std::fmt;

/// A Cargo feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub name: &'static str,
    /// Whether this build has it.
    pub enabled: bool,
}

/// Parquet files.
#[cfg_attr(feature = "parquet", expect(dead_code, reason = "named where it is absent"))]
pub const PARQUET: Feature = Feature { name: "parquet", enabled: cfg!(feature = "parquet") };
/// Judges and scorers behind HTTP.
pub const HTTP: Feature = Feature { name: "http", enabled: cfg!(feature = "http") };
/// The labelling page.
pub const LABEL: Feature = Feature { name: "label", enabled: cfg!(feature = "label") };
/// BERT encoders, and judges of architectures that are not trained.
pub const ENCODERS: Feature = Feature { name: "encoders", enabled: cfg!(feature = "encoders") };
/// The Prometheus endpoint.
pub const PROMETHEUS: Feature = Feature { name: "prometheus", enabled: cfg!(feature = "prometheus") };

/// Rules that need more than the others.
pub const VERIFY: Feature = Feature { name: "verify", enabled: cfg!(feature = "verify") };
/// The job viewer.
pub const VIEW: Feature = Feature { name: "view", enabled: cfg!(feature = "view") };
/// Nodes that generate.
pub const NODES: Feature = Feature { name: "nodes", enabled: cfg!(feature = "nodes") };

/// Members in other processes.
#[cfg_attr(
    any(feature = "mpi", not(feature = "cli")),
    expect(dead_code, reason = "the command names it where it is absent")
)]
pub const MPI: Feature = Feature { name: "mpi", enabled: cfg!(feature = "mpi") };

/// Completes a sentence such as "`judge.url` needs".
impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        write!(
            f,
            "the feature `{name}`, which this build of rehearsal does not have; build it with `--features {name}`"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Config;

    /// The keys that need a feature.
    const KEYS: [(&str, &str, Feature); 7] = [
        ("view", "listen = \"127.0.0.1:0\"", VIEW),
        ("nodes", "listen = \"127.0.0.1:0\"", NODES),
        ("judge", "url = \"http://localhost/v1\"", HTTP),
        ("scorer", "url = \"http://localhost\"", HTTP),
        ("encoder", "model = \"/\"", ENCODERS),
        ("people", "listen = \"127.0.0.1:0\"", LABEL),
        ("metrics", "listen = \"127.0.0.1:0\"", PROMETHEUS),
    ];

    #[test]
    fn a_key_of_an_absent_feature_says_which() {
        for (section, key, feature) in KEYS {
            let document = format!("[job]\ndirectory = \"x\"\n[{section}]\n{key}\n");
            let read = Config::from_toml(&document, Path::new("/")).map_err(|e| e.to_string());
            let message = read.err().unwrap_or_default();
            let name = key.split(' ').next().unwrap();
            let wanted = format!("`{section}.{name}` needs the feature `{}`, which this build", feature.name);
            assert_eq!(message.contains(&wanted), !feature.enabled, "{message}");
        }
    }
}
