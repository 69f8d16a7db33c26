//! Reads configurations: TOML documents of sections and keys into typed settings.
//!
//! This folder knows no section and no key. Whoever owns a section implements [`Settings`]: one visit of every key with
//! its field, range and help. Reading a file, checking a job built in Rust, the reference page, the JSON schema, the
//! TOML of a job and its fingerprint all come from that one visit.

mod document;
mod keys;
mod overrides;
mod paths;
mod problem;
mod range;
mod reference;
mod section;
mod stages;

pub use keys::{Effect, Key, Keys, Kind, Settings};
pub(crate) use overrides::with_values;
pub use paths::{ModelSource, folder_of};
pub use problem::{ConfigError, Problem};
pub use range::Range;
pub use reference::{json_schema, markdown};
pub use section::Section;
pub(crate) use stages::{Earlier, split};
