//! Preference labels from people: a page in the browser where they rank completions or write demonstrations, either for
//! a ledger of its own (`rehearsal label`) or as the reward of a job that waits for them (`[people]`).
//!
//! [`queue`] holds items, labels and leases, without clock, disk or network. [`service`] shares it between threads and
//! saves each label before it counts. [`store`] is where labels are saved, [`server`] the HTTP server, [`people`] the
//! reward.

pub mod items;
pub mod people;
pub mod queue;
pub mod server;
pub mod service;
pub mod store;

pub use crate::web::{Access, WebServer as LabelServer};
pub use people::PeopleReward;
pub use queue::{Item, Label, LabelQueue, LabelValue};
pub use server::serve;
pub(crate) use server::{WHAT, serve_on};
pub use service::LabelService;
pub use store::{LabelStore, LedgerLabels};
