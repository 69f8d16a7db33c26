//! Devices of a job, and which role computes where.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;
use parking_lot::{FairMutex, FairMutexGuard};

use crate::{Error, Ranks, Result, Waits};

/// A device as the configuration names it: `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Placement {
    /// The CPU.
    #[default]
    Cpu,
    /// The CUDA device of this index, from 0.
    Cuda(usize),
}

impl FromStr for Placement {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::Placement { given: s.into(), reason: reason.into() };
        match s.split_once(':') {
            None if s == "cpu" => Ok(Placement::Cpu),
            Some(("cuda", n)) => n
                .parse()
                .map(Placement::Cuda)
                .map_err(|_| wrong("the device number must be an integer, as in `cuda:0`")),
            _ => Err(wrong("the device must be `cpu` or `cuda:N`, such as `cuda:0`")),
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

/// The devices of a job, or of several. Roles on the same device share it and compute one at a time, in the order in
/// which they ask for it. Clones share the devices: jobs that are given clones compute in turns, on the same CPU threads.
#[derive(Clone)]
pub struct Devices {
    open: Arc<Mutex<BTreeMap<Placement, SharedDevice>>>,
    pool: Arc<rayon::ThreadPool>,
    waits: Waits,
    ranks: Option<Ranks>,
}

/// A device that roles share. Clones share its lock and its thread pool.
#[derive(Clone)]
pub(crate) struct SharedDevice {
    /// The candle device.
    pub device: Device,
    /// Where it is.
    pub placement: Placement,
    /// Held by the role that computes. Fair, so that no job waits for more than one request of each other role.
    lock: Arc<FairMutex<()>>,
    pool: Arc<rayon::ThreadPool>,
    waits: Waits,
}

impl Devices {
    /// Creates a CPU thread pool of `threads` threads, or of one for each core if that is 0. Results do not depend
    /// on the number. Devices are opened when a role first needs them.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self { open: Arc::default(), pool: Arc::new(pool(threads, "cpu")?), waits: Waits::default(), ranks: None })
    }

    /// The same devices, for models that have a member in each of some processes.
    pub fn with_ranks(mut self, ranks: Ranks) -> Self {
        self.ranks = Some(ranks);
        self
    }

    pub(crate) fn ranks(&self) -> Option<&Ranks> {
        self.ranks.as_ref().filter(|ranks| ranks.size() > 1)
    }

    /// The same devices for a job whose waits for them are noted in `waits`.
    pub fn noting(&self, waits: Waits) -> Self {
        Self { waits, ..self.clone() }
    }

    /// The device of a placement.
    pub(crate) fn get(&self, placement: Placement) -> Result<SharedDevice> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = open.get(&placement) {
            return Ok(SharedDevice { waits: self.waits.clone(), ..shared.clone() });
        }
        let device = match placement {
            Placement::Cpu => Device::Cpu,
            Placement::Cuda(n) => {
                // The first line: what follows is a backtrace.
                let reason = |e: candle_core::Error| e.to_string().lines().next().unwrap_or_default().to_string();
                cuda(n).map_err(|e| Error::Placement { given: placement.to_string(), reason: reason(e) })?
            }
        };
        // A GPU's work is asked for by a thread of its own: in the CPU's pool two GPUs would wait for each other.
        let pool = match placement {
            Placement::Cpu => self.pool.clone(),
            Placement::Cuda(n) => Arc::new(pool(1, &format!("cuda{n}"))?),
        };
        let (lock, waits) = (Arc::new(FairMutex::new(())), self.waits.clone());
        let shared = SharedDevice { device, placement, lock, pool, waits };
        open.insert(placement, shared.clone());
        Ok(shared)
    }

    /// Opens the device of a placement, if no role has yet.
    ///
    /// # Errors
    ///
    /// [`Error::Placement`] if this machine or build has no such device.
    pub fn open(&self, placement: Placement) -> Result<()> {
        self.get(placement).map(drop)
    }

    /// Candle's device of a placement, for tensors of one's own.
    ///
    /// # Errors
    ///
    /// [`Error::Placement`] if this machine or build has no such device.
    pub fn candle(&self, placement: Placement) -> Result<Device> {
        Ok(self.get(placement)?.device)
    }

    /// Runs `f` on the job's thread pool while it holds the device, which roles use in turn.
    pub fn run<T: Send>(&self, placement: Placement, f: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.get(placement)?.run(f))
    }
}

impl SharedDevice {
    /// Runs `f` on the device's threads while no other role computes on the device.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let turn = self.turn();
        let result = self.pool.install(f);
        drop(turn);
        result
    }

    /// Keeps the device from other roles while the guard lives.
    pub fn turn(&self) -> FairMutexGuard<'_, ()> {
        self.lock.try_lock().unwrap_or_else(|| {
            let _wait = self.waits.enter("device", self.placement.to_string());
            self.lock.lock()
        })
    }

    /// The device with `threads` CPU threads of their own, whose work needs no turn of the device.
    pub fn beside(&self, threads: usize) -> Result<Self> {
        Ok(Self { lock: Arc::default(), pool: Arc::new(pool(threads, "beside")?), ..self.clone() })
    }

    /// `n` shares of the device, each with its part of the threads, and at least one. They have locks of their own, so the lock of
    /// the whole device ([`Self::turn`]) must be held while they compute.
    pub fn shares(&self, n: usize) -> Result<Vec<Self>> {
        let threads = self.pool.current_num_threads();
        let share = |index: usize| self.beside(((index + 1) * threads / n - index * threads / n).max(1));
        (0..n).map(share).collect()
    }
}

/// A pool of `threads` threads, or of one for each core if that is 0.
fn pool(threads: usize, name: &str) -> Result<rayon::ThreadPool> {
    let (pool, name) = (rayon::ThreadPoolBuilder::new().num_threads(threads), name.to_string());
    let pool = pool.thread_name(move |i| format!("rehearsal-{name}-{i}")).build();
    pool.map_err(|e| Error::Placement { given: "cpu".into(), reason: e.to_string() })
}

/// Opens a CUDA device with one stream for all threads: with candle's default of a stream per thread, a tensor that
/// crosses threads is a race. The memory pool keeps freed memory, since every step allocates it again.
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
