//! Tells what a job has been waiting for for long: by an event, a metric and the status.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::{WaitName, Waits};
use tokio::sync::{broadcast, watch};

use crate::events::Event;
use crate::metrics::Meters;
use crate::metrics::table::{WAITED_FOR, process};
use crate::status::{JobStatus, Waiting};

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(1);

/// Watches a job's waits until the task is aborted. A wait is told once it is `notice` long, and again each time that it is
/// twice as long.
pub async fn watch_waits(
    waits: Waits,
    notice: Duration,
    events: broadcast::Sender<Event>,
    meters: Arc<Meters>,
    status: watch::Sender<JobStatus>,
) {
    let mut told: BTreeMap<WaitName, Duration> = BTreeMap::new();
    loop {
        tokio::time::sleep(EVERY.min(notice)).await;
        let current = waits.current();
        for whom in WAITED_FOR.values {
            let oldest = current.iter().filter(|(name, _)| name.whom == *whom).map(|(_, since)| *since).max();
            meters.set_series(process::WAIT_SECONDS, whom, oldest.unwrap_or_default().as_secs_f64());
        }
        told.retain(|name, since| current.get(name).is_some_and(|now| now >= since));
        let long =
            |(name, since): (&WaitName, &Duration)| Waiting { wait: name.to_string(), seconds: since.as_secs_f64() };
        let waiting: Vec<Waiting> = current.iter().filter(|(_, since)| **since >= notice).map(long).collect();
        for (name, since) in &current {
            let due = told.get(name).map_or(notice, |last| *last * 2);
            if *since >= due {
                told.insert(name.clone(), *since);
                let _ = events.send(Event::Waiting { wait: name.to_string(), seconds: since.as_secs_f64() });
            }
        }
        status.send_if_modified(|status| {
            let changed = !(status.waiting.is_empty() && waiting.is_empty());
            status.waiting = waiting;
            changed
        });
    }
}
