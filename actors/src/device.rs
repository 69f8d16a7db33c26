//! Where a role computes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;

use crate::{Error, Result};

/// A device as the configuration names it: `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Placement {
    #[default]
    Cpu,
    Cuda(usize),
}

impl FromStr for Placement {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::Placement { given: s.into(), reason: reason.into() };
        match s.split_once(':') {
            None if s == "cpu" => Ok(Placement::Cpu),
            Some(("cuda", n)) => {
                n.parse().map(Placement::Cuda).map_err(|_| wrong("the number of the device is no number"))
            }
            _ => Err(wrong("say `cpu`, or `cuda:0` with the device's number")),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Cpu => f.write_str("cpu"),
            Placement::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// The devices of a job: one of each, shared by the roles on it, which take turns.
#[derive(Clone)]
pub struct Devices {
    open: Arc<Mutex<BTreeMap<Placement, Seat>>>,
    pool: Arc<rayon::ThreadPool>,
}

/// A role's place on a device.
#[derive(Clone)]
pub(crate) struct Seat {
    pub device: Device,
    pub placement: Placement,
    turn: Arc<Mutex<()>>,
    pool: Arc<rayon::ThreadPool>,
}

impl Devices {
    /// `threads` for the CPU; 0 takes one for each core. The results do not depend on it.
    pub fn new(threads: usize) -> Result<Self> {
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("rehearsal-cpu-{i}")).build();
        let pool = pool.map_err(|e| Error::Placement { given: "cpu".into(), reason: e.to_string() })?;
        Ok(Self { open: Arc::default(), pool: Arc::new(pool) })
    }

    pub(crate) fn seat(&self, placement: Placement) -> Result<Seat> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seat) = open.get(&placement) {
            return Ok(seat.clone());
        }
        let device = match placement {
            Placement::Cpu => Device::Cpu,
            Placement::Cuda(n) => {
                cuda(n).map_err(|e| Error::Placement { given: placement.to_string(), reason: e.to_string() })?
            }
        };
        let seat = Seat { device, placement, turn: Arc::default(), pool: self.pool.clone() };
        open.insert(placement, seat.clone());
        Ok(seat)
    }

    /// Runs `f` on the job's thread pool while it holds the device, which roles use in turn.
    pub fn run<T: Send>(&self, placement: Placement, f: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.seat(placement)?.run(f))
    }
}

impl Seat {
    /// Runs `f` with the device to itself, on the job's threads.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let _turn: MutexGuard<'_, ()> = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.pool.install(f)
    }
}

/// One stream for all threads: candle's default per-thread streams race when a tensor crosses threads. Freed memory stays with
/// the device, since every step takes it again.
#[cfg(feature = "cuda")]
fn cuda(n: usize) -> candle_core::Result<Device> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let device = Device::new_cuda_with_stream(n)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: every tensor of this device is used on its single stream, so no event has to order streams.
    unsafe { cuda.disable_event_tracking() };
    let mut keep = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool is the device's own, and the attribute's value is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(cuda.cuda_stream().context().cu_device()).w()?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast()).w()?;
    }
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> candle_core::Result<Device> {
    candle_core::bail!("this program was built without CUDA; build it with `--features cuda`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placements_parse_and_print() {
        for text in ["cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<Placement>().unwrap().to_string(), text);
        }
        for text in ["gpu", "cuda", "cuda:x", ""] {
            let error = text.parse::<Placement>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
