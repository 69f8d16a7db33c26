//! The one integration binary: golden values, real models, loops, crashes, real Prometheus.

mod bad_input;
mod chat;
mod crash;
mod docs;
mod embed;
mod golden;
mod prometheus;
mod roles;
mod round_trip;
mod support;
