//! `[view]`

use std::net::SocketAddr;

use crate::config::{Keys, Settings};
use crate::features::VIEW;

/// `[view]`: the job viewer, in the browser, within the job's process.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ViewSettings {
    /// Where the viewer is served; `None` serves it nowhere.
    pub listen: Option<SocketAddr>,
    /// Environment variable with the token.
    pub token_env: Option<String>,
}

impl Settings for ViewSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("view");
        s.speed().parsed(
            "listen",
            &mut self.listen,
            "an address such as \"127.0.0.1:8766\"",
            "an address with a port, such as \"127.0.0.1:8766\"",
            "Serve the job viewer there: curves, answers with scores and verdicts, and controls. On this machine anybody may read; \
             changes, and reading from beyond, need the token that is part of the URL which the job shows.",
        );
        if self.listen.is_some() {
            s.requires("listen", VIEW.enabled, VIEW);
        }
        let help = "Environment variable with a token of 16 characters or more; it is never stored or logged.";
        s.speed().text("token_env", &mut self.token_env, "a variable's name", help);
    }
}
