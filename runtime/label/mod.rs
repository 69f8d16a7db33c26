//! People who know better than the model: a page in the browser where they rank answers or write their own, for a ledger
//! of their own (`rehearsal label`) or as the reward of a job that waits for them (`[people]`).
//!
//! [`board`] is what there is to do and what was said, without clock, disk or network; [`desk`] puts it behind a lock and
//! writes every word down before it counts; [`server`] speaks HTTP; [`people`] is the reward.

pub mod board;
pub mod book;
pub mod desk;
pub mod items;
pub mod people;
pub mod server;

pub use board::{Board, Item, Label, Word};
pub use book::{Book, LedgerBook};
pub use desk::Desk;
pub use people::PeopleReward;
pub use server::{Access, Served, serve};
