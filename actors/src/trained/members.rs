//! The members of a trained model, each of which works on a thread of its own while all work.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;

use candle_core::Tensor;
use rehearsal_learn::adamw::{Ranges, joined};
use rehearsal_lm::Checkpoint;

use super::TrainedConfig;
use super::member::Member;
use super::sum::LeafSum;
use super::tree::Tree;
use crate::device::SharedDevice;
use crate::{Devices, Error, ModelSnapshot, Placement, Result, StepTimes};

/// One member or more.
pub(super) struct Members {
    all: Vec<Member>,
    /// The device of the first member; the whole CPU where members have shares of it.
    device: SharedDevice,
}

impl Members {
    /// The members as training starts.
    pub fn new(checkpoint: &Arc<Checkpoint>, config: &TrainedConfig, devices: &Devices) -> Result<Self> {
        let placements = &config.placements;
        check(placements, config.leaves)?;
        let first = placements.first().copied().unwrap_or_default();
        let device = devices.get(first)?;
        let shares = match (first, placements.len()) {
            (_, 0 | 1) => vec![device.clone()],
            (Placement::Cpu, n) => device.shares(n)?,
            (Placement::Cuda(_), _) => placements.iter().map(|p| devices.get(*p)).collect::<Result<_>>()?,
        };
        let count = shares.len();
        let member = |(index, share)| {
            let shard = (config.shard && count > 1).then_some((index, count));
            Member::new(checkpoint.clone(), config.clone(), share, shard)
        };
        Ok(Self { all: shares.into_iter().enumerate().map(member).collect::<Result<_>>()?, device })
    }

    /// One of them, for what all have.
    pub fn first(&self) -> &Member {
        &self.all[0]
    }

    /// Lets each member do something at the same time. The error is that of the first member that has one.
    pub fn each<T: Send>(&mut self, work: impl Fn(usize, &mut Member) -> Result<T> + Sync) -> Result<Vec<T>> {
        if let [only] = self.all.as_mut_slice() {
            return Ok(vec![work(0, only)?]);
        }
        let whole_cpu = (self.device.placement == Placement::Cpu).then_some(&self.device);
        let _turn = whole_cpu.map(SharedDevice::turn);
        let work = &work;
        let results: Vec<Result<T>> = std::thread::scope(|scope| {
            let start = |(index, member)| {
                let builder = std::thread::Builder::new().name(format!("rehearsal-member-{index}"));
                let failed = |e: std::io::Error| Error::Start { role: "member", reason: e.to_string() };
                builder.spawn_scoped(scope, move || work(index, member)).map_err(failed)
            };
            let threads: Vec<_> = self.all.iter_mut().enumerate().map(start).collect();
            // A panic ends the role, as one on its own thread does.
            threads.into_iter().map(|thread| thread?.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        results.into_iter().collect()
    }

    /// Runs `f` on the first member's device.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.device.run(f)
    }

    /// Contiguous parts of `items`, one for each member, as equal as can be when those that `together` puts in one group stay
    /// together.
    pub fn split<T>(&self, items: &[T], together: impl Fn(&T, &T) -> bool) -> Vec<Range<usize>> {
        let starts: Vec<usize> = (0..items.len()).filter(|&i| i == 0 || !together(&items[i - 1], &items[i])).collect();
        let n = self.all.len();
        let at = |part: usize| starts.get(part * starts.len() / n).copied().unwrap_or(items.len());
        (0..n).map(|part| at(part)..at(part + 1)).collect()
    }

    /// The leaves of each member.
    pub fn leaves(&self, leaves: usize) -> Vec<Range<usize>> {
        let each = leaves / self.all.len();
        (0..self.all.len()).map(|member| member * each..(member + 1) * each).collect()
    }

    /// Updates the weights of all by the gradients of a step, which are multiplied by `scale`.
    pub fn update(&mut self, gradients: &BTreeMap<String, Tensor>, learning_rate: f64, scale: f64) -> Result<()> {
        let updated = self.each(|_, member| member.update(gradients, learning_rate, scale))?;
        let ranges: Vec<Option<Ranges>> = self.all.iter().map(|member| member.ranges().cloned()).collect();
        self.each(|index, member| {
            for (owner, (ranges, updated)) in ranges.iter().zip(&updated).enumerate() {
                if let Some(ranges) = ranges.as_ref().filter(|_| owner != index) {
                    member.set_elements(ranges, updated)?;
                }
            }
            member.updated()
        })?;
        Ok(())
    }

    /// Weights and optimizer state.
    pub fn snapshot(&self, version: u64) -> Result<ModelSnapshot> {
        let first = self.first();
        if first.ranges().is_none() {
            return Ok(first.snapshot(version, first.moments()));
        }
        let mut shards = Vec::new();
        for member in &self.all {
            let here = |(name, t): (String, Tensor)| Ok((name, t.to_device(&first.compute.device)?));
            let moments = member.moments().into_iter().map(here).collect::<Result<_>>()?;
            shards.push((member.ranges().cloned().unwrap_or_default(), moments));
        }
        Ok(first.snapshot(version, joined(shards, first.variables())?))
    }

    /// Adds the sums of all members in the tree's order. Of their times the longest count, since they work side by side.
    pub fn add(&self, leaves: usize, sums: Vec<Vec<(Range<usize>, LeafSum)>>) -> Result<(LeafSum, StepTimes)> {
        let of = |sums: &Vec<(Range<usize>, LeafSum)>| {
            let mut times = StepTimes::default();
            sums.iter().for_each(|(_, sum)| times.add(&sum.times));
            times
        };
        let times = sums.iter().map(of).max_by_key(StepTimes::total).unwrap_or_default();
        self.device.run(|| {
            let mut tree = Tree::new(leaves);
            for (range, sum) in sums.into_iter().flatten() {
                tree.push(range, sum, LeafSum::add)?;
            }
            let whole = tree.into_sums().pop().map(|(_, sum)| sum);
            Ok((whole.unwrap_or_default(), times))
        })
    }
}

/// Checks that members can share a step's leaves and compute the same.
fn check(placements: &[Placement], leaves: usize) -> Result<()> {
    let wrong = |reason: String| {
        let given: Vec<String> = placements.iter().map(Placement::to_string).collect();
        Err(Error::Placement { given: given.join(", "), reason })
    };
    let members = placements.len();
    if members == 0 || leaves == 0 || leaves % members != 0 {
        return wrong(format!("{leaves} leaves cannot be divided among {members} members"));
    }
    let on_cpu = placements.iter().filter(|p| **p == Placement::Cpu).count();
    if on_cpu != 0 && on_cpu != members {
        return wrong("CPU and CUDA round differently; the members of a role must be all one or all the other".into());
    }
    Ok(())
}
