//! The one integration binary: golden values, real models, loops, crashes, real Prometheus.

mod golden;
