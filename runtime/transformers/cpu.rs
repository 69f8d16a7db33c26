//! Where forward passes run.

use rehearsal_actors::{Devices, Placement};

/// Runs a forward pass on the job's thread pool while it holds the CPU, which roles use in turn.
pub(super) fn on_cpu<T: Send>(
    devices: &Devices,
    forward: impl FnOnce() -> candle_core::Result<T> + Send,
) -> Result<T, String> {
    devices.run(Placement::Cpu, forward).map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_passes_run_on_the_pool_of_the_job() {
        let devices = Devices::new(1).unwrap();
        let name = on_cpu(&devices, || Ok(std::thread::current().name().map(String::from))).unwrap();
        assert!(name.as_ref().is_some_and(|name| name.starts_with("rehearsal-cpu-")), "{name:?}");
    }
}
