//! The members of a trained model: of this process, each of which works on a thread of its own while all work, and of others.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;

use candle_core::Tensor;
use rehearsal_learn::adamw::{Ranges, joined, shards};
use rehearsal_learn::global_norm;
use rehearsal_lm::Checkpoint;
use rehearsal_lm::generate::{Completion, Options, Request};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use super::sum::LeafSum;
use super::tree::Tree;
use super::{TrainedConfig, UpdateBatch};
use crate::device::SharedDevice;
use crate::ranks::{Exchange, Peers};
use crate::{Devices, Error, MaskedSequence, ModelSnapshot, Placement, Result, StepTimes, Tokens, passes};

/// One member or more.
pub(super) struct Members {
    /// Members of this process: one, where there are others in other processes.
    all: Vec<Member>,
    peers: Option<Peers>,
    /// The device of the first member; the whole CPU where members have shares of it.
    device: SharedDevice,
    leaves: usize,
    micro_batch_tokens: usize,
}

/// The gradients of a step, added, and what else there is of it.
pub(super) struct Summed {
    pub sum: LeafSum,
    /// Wall time of the slowest member.
    pub times: StepTimes,
    /// Global norm of the gradients.
    pub norm: f64,
    /// This rank's part of the gradients, where members are in other processes.
    exchange: Option<Exchange>,
}

impl Members {
    /// The members as training starts.
    pub fn new(checkpoint: &Arc<Checkpoint>, config: &TrainedConfig, devices: &Devices) -> Result<Self> {
        let placements = &config.placements;
        check(placements, config.leaves)?;
        let first = placements.first().copied().unwrap_or_default();
        let device = devices.get(first)?;
        let peers = match devices.ranks() {
            Some(ranks) => {
                check_ranks(placements, ranks.size(), config.leaves)?;
                Some(Peers::new(ranks, checkpoint, config)?)
            }
            None => None,
        };
        let shares = match (first, placements.len()) {
            (_, 0 | 1) => vec![device.clone()],
            (Placement::Cpu, n) => device.shares(n)?,
            (Placement::Cuda(_), _) => placements.iter().map(|p| devices.get(*p)).collect::<Result<_>>()?,
        };
        let count = peers.as_ref().map_or(shares.len(), Peers::size);
        let member = |(index, share)| {
            let shard = (config.shard && count > 1).then_some((index, count));
            Member::new(checkpoint.clone(), config.clone(), share, shard)
        };
        Ok(Self {
            all: shares.into_iter().enumerate().map(member).collect::<Result<_>>()?,
            peers,
            device,
            leaves: config.leaves,
            micro_batch_tokens: config.micro_batch_tokens,
        })
    }

    /// One of them, for what all have.
    pub fn first(&self) -> &Member {
        &self.all[0]
    }

    fn count(&self) -> usize {
        self.peers.as_ref().map_or(self.all.len(), Peers::size)
    }

    /// Lets each member of this process do something at the same time. The error is that of the first member that has one.
    fn each<T: Send>(&mut self, work: impl Fn(usize, &mut Member) -> Result<T> + Sync) -> Result<Vec<T>> {
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

    /// Contiguous parts of `items`, one for each member, as equal as can be when those that `together` puts in one group stay
    /// together.
    fn split<T>(&self, items: &[T], together: impl Fn(&T, &T) -> bool) -> Vec<Range<usize>> {
        let starts: Vec<usize> = (0..items.len()).filter(|&i| i == 0 || !together(&items[i - 1], &items[i])).collect();
        let n = self.count();
        let at = |part: usize| starts.get(part * starts.len() / n).copied().unwrap_or(items.len());
        (0..n).map(|part| at(part)..at(part + 1)).collect()
    }

    /// Samples completions, each member for its part of the prompts.
    pub fn generate(
        &mut self,
        requests: &[Request],
        options: &Options,
        keep_tokens: usize,
        finished: &UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let parts = self.split(requests, |a, b| a.prompt == b.prompt);
        if let Some(peers) = &self.peers {
            return peers.generate(&mut self.all[0], (requests, &parts), options, keep_tokens, finished, cancel);
        }
        let of = |index: usize| requests[parts[index].clone()].to_vec();
        self.each(|index, member| member.generate(of(index), options, keep_tokens, finished, cancel)).map(drop)
    }

    pub fn logprobs(&mut self, tokens: &[Tokens], temperature: f64) -> Result<Vec<Vec<f32>>> {
        let parts = self.split(tokens, |a, b| a.prompt == b.prompt);
        if let Some(peers) = &self.peers {
            let own = || self.all[0].logprobs(&tokens[parts[0].clone()], temperature);
            return peers.logprobs(tokens, &parts, temperature, own);
        }
        let all = self.each(|index, member| member.logprobs(&tokens[parts[index].clone()], temperature))?;
        Ok(all.concat())
    }

    pub fn values(&mut self, tokens: &[Tokens]) -> Result<Vec<Vec<f32>>> {
        let (parts, budget) = (self.split(tokens, |a, b| a.prompt == b.prompt), self.micro_batch_tokens);
        let of = |member: &Member, part: &Range<usize>| {
            member.compute.run(|| passes::values(&member.decoder, &tokens[part.clone()], budget))
        };
        match &self.peers {
            Some(peers) => peers.values(tokens, &parts, || of(&self.all[0], &parts[0])),
            None => Ok(self.each(|index, member| of(member, &parts[index]))?.concat()),
        }
    }

    pub fn scores(&mut self, tokens: &[Tokens]) -> Result<Vec<f32>> {
        let (parts, budget) = (self.split(tokens, |a, b| a.prompt == b.prompt), self.micro_batch_tokens);
        let of = |member: &Member, part: &Range<usize>| {
            member.compute.run(|| passes::scores(&member.decoder, &tokens[part.clone()], budget))
        };
        match &self.peers {
            Some(peers) => peers.scores(tokens, &parts, || of(&self.all[0], &parts[0])),
            None => Ok(self.each(|index, member| of(member, &parts[index]))?.concat()),
        }
    }

    pub fn likelihoods(&mut self, sequences: &[MaskedSequence]) -> Result<Vec<f64>> {
        let (parts, budget) = (self.split(sequences, |_, _| false), self.micro_batch_tokens);
        let of = |member: &Member, part: &Range<usize>| {
            member.compute.run(|| passes::likelihoods(&member.decoder, &sequences[part.clone()], budget))
        };
        match &self.peers {
            Some(peers) => peers.likelihoods(sequences, &parts, || of(&self.all[0], &parts[0])),
            None => Ok(self.each(|index, member| of(member, &parts[index]))?.concat()),
        }
    }

    /// The gradients of a step: each member computes its leaves, which are added in the tree's order.
    pub fn gradients(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<Summed> {
        let each = self.leaves / self.count();
        let parts: Vec<Range<usize>> = (0..self.count()).map(|i| i * each..(i + 1) * each).collect();
        if let Some(peers) = &self.peers {
            let member = &mut self.all[0];
            let (own, others, nodes) = peers.gradients(member, batch, &parts, cancel)?;
            let bare = own.iter().map(|(range, sum)| (range.clone(), sum.without_gradients())).collect();
            let (sum, times) = add(self.leaves, std::iter::once(bare).chain(others))?;
            if !nodes.iter().flatten().any(|(_, has_gradients)| *has_gradients) {
                return Err(nothing_to_learn());
            }
            let (exchange, norm) = peers.sum(member, self.leaves, own, nodes)?;
            return Ok(Summed { sum, times, norm, exchange: Some(exchange) });
        }
        let sums = self.each(|index, member| member.gradients(batch, parts[index].clone(), cancel))?;
        self.device.run(|| {
            let (sum, times) = add(self.leaves, sums)?;
            let norm = global_norm(sum.gradients.as_ref().ok_or_else(nothing_to_learn)?)?;
            Ok(Summed { sum, times, norm, exchange: None })
        })
    }

    /// Updates the weights of all by the gradients of a step, which are multiplied by `scale`.
    pub fn update(&mut self, summed: Summed, learning_rate: f64, scale: f64) -> Result<()> {
        if let (Some(peers), Some(exchange)) = (&self.peers, summed.exchange) {
            return peers.update(&mut self.all[0], exchange, learning_rate, scale);
        }
        let gradients = summed.sum.gradients.ok_or_else(nothing_to_learn)?;
        let updated = self.each(|_, member| member.update(&gradients, learning_rate, scale))?;
        drop(gradients);
        let ranges: Vec<Option<Ranges>> = self.all.iter().map(|member| member.ranges().cloned()).collect();
        self.each(|index, member| {
            for (owner, (ranges, updated)) in ranges.iter().zip(&updated).enumerate() {
                for (name, values) in updated.iter().filter(|_| owner != index) {
                    let start = ranges.as_ref().and_then(|ranges| ranges.get(name)).map_or(0, |range| range.start);
                    member.set_elements(name, start, values)?;
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
        let here = |moments: BTreeMap<String, Tensor>| {
            let one = |(name, t): (String, Tensor)| Ok((name, t.to_device(&first.compute.device)?));
            moments.into_iter().map(one).collect::<Result<BTreeMap<_, _>>>()
        };
        let mut moments = self.all.iter().map(|member| here(member.moments())).collect::<Result<Vec<_>>>()?;
        if let Some(peers) = &self.peers {
            moments.extend(peers.moments()?);
        }
        let parts = shards(first.variables(), self.count()).into_iter().zip(moments);
        Ok(first.snapshot(version, joined(parts, first.variables())?))
    }

    /// Returns to a snapshot.
    pub fn restore(&mut self, snapshot: &ModelSnapshot) -> Result<()> {
        if let Some(peers) = &self.peers {
            peers.restore(snapshot)?;
        }
        self.each(|_, member| member.restore(snapshot)).map(drop)
    }
}

fn nothing_to_learn() -> Error {
    Error::Data("no leaf of the step has data to learn from".into())
}

/// Adds the sums of all members in the tree's order. Of their times the longest count, since they work side by side.
fn add(leaves: usize, sums: impl IntoIterator<Item = Vec<(Range<usize>, LeafSum)>>) -> Result<(LeafSum, StepTimes)> {
    let (mut tree, mut longest) = (Tree::new(leaves), StepTimes::default());
    for sums in sums {
        let mut times = StepTimes::default();
        for (range, sum) in sums {
            times.add(&sum.times);
            tree.push(range, sum, LeafSum::add)?;
        }
        if times.total() > longest.total() {
            longest = times;
        }
    }
    let whole = tree.into_sums().pop().map(|(_, sum)| sum);
    Ok((whole.unwrap_or_default(), longest))
}

/// Checks that members can share a step's leaves and compute the same.
fn check(placements: &[Placement], leaves: usize) -> Result<()> {
    let wrong = |reason: String| Err(Error::Placement { given: given(placements), reason });
    let members = placements.len();
    if members == 0 || leaves == 0 || !leaves.is_multiple_of(members) {
        return wrong(format!("{leaves} leaves cannot be divided among {members} members"));
    }
    let on_cpu = placements.iter().filter(|p| **p == Placement::Cpu).count();
    if on_cpu != 0 && on_cpu != members {
        return wrong("CPU and CUDA round differently; the members of a role must be all one or all the other".into());
    }
    Ok(())
}

/// Checks that the members of a job's processes can share a step's leaves.
fn check_ranks(placements: &[Placement], ranks: usize, leaves: usize) -> Result<()> {
    let wrong = |reason: String| Err(Error::Placement { given: given(placements), reason });
    if placements != [Placement::Cpu] {
        return wrong(format!(
            "a job of {ranks} processes has one member on the CPU in each; set `placement.policy` to \"cpu\""
        ));
    }
    if !leaves.is_multiple_of(ranks) {
        return wrong(format!(
            "{ranks} processes do not divide `optimizer.leaves` = {leaves} (the parts of a step); set it to a multiple of {ranks}, or \
             start another number of processes"
        ));
    }
    Ok(())
}

fn given(placements: &[Placement]) -> String {
    placements.iter().map(Placement::to_string).collect::<Vec<_>>().join(", ")
}
