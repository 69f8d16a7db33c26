//! The one integration binary: golden values, real models, loops, crashes, real Prometheus.

mod access;
mod architecture;
mod bad_input;
mod chat;
mod cli;
mod crash;
mod docs;
mod embed;
mod evaluate;
mod fixtures;
mod gguf_judge;
mod golden;
mod gpu;
mod handle;
mod judges;
mod label;
mod ledger;
mod loops;
mod oracle;
mod overlap;
mod own_algorithm;
mod prometheus;
mod roles;
mod round_trip;
mod served_judge;
mod support;
