//! Wall-clock time.

use std::time::{SystemTime, UNIX_EPOCH};

/// Today in UTC, in days after 1 January 1970.
pub(crate) fn today() -> u32 {
    (now_ms() / 86_400_000) as u32
}

/// Returns the current time in milliseconds since the Unix epoch, or 0 if the clock is set before it.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
