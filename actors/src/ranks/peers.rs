//! Rank 0's side: members of a model in the other ranks.

use std::ops::Range;
use std::panic::resume_unwind;

use rehearsal_lm::generate::{Completion, Options, Request as Prompt};
use rehearsal_lm::{Checkpoint, Precision};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use super::exchange::Exchange;
use super::message::{MemberConfig, Node, NodeSum, Pause, Reply, Request, read, send, wait_for};
use super::tensors::{self, described};
use super::{Ranks, Wire};
use crate::files::ModelFiles;
use crate::objective::Portable;
use crate::trained::{LeafSum, Member, TrainedConfig, UpdateBatch};
use crate::{Error, MaskedSequence, ModelSnapshot, Result, Tokens};

/// The members of a model in the ranks from 1 on.
pub(crate) struct Peers {
    ranks: Ranks,
    model: u32,
}

/// A rank's sums of leaves, without their gradients.
pub type RankSums = Vec<(Range<usize>, LeafSum)>;

impl Peers {
    /// Makes a member of the model in every other rank.
    pub fn new(ranks: &Ranks, checkpoint: &Checkpoint, config: &TrainedConfig) -> Result<Self> {
        let peers = Self { ranks: ranks.clone(), model: ranks.next_model() };
        let files = ModelFiles::of(checkpoint);
        let config = MemberConfig {
            leaves: config.leaves,
            shard: config.shard,
            optimizer: config.optimizer,
            micro_batch_tokens: config.micro_batch_tokens,
            bf16: config.precision == Precision::Bf16,
            gradient_checkpointing: config.gradient_checkpointing,
            ema_decay: config.ema_decay,
            lora: config.lora.clone(),
        };
        let (parameters, bytes) = described(&checkpoint.parameters)?;
        let wire = ranks.wire();
        let build = Request::Build { model: peers.model, files, parameters, config };
        peers.to_all(&**wire, &build, &bytes);
        peers.replies_of_all(&**wire)?;
        drop(wire);
        Ok(peers)
    }

    /// Ranks, this one included.
    pub fn size(&self) -> usize {
        self.ranks.size()
    }

    /// Sends a request to all, and what follows it.
    fn to_all(&self, wire: &dyn Wire, request: &Request, following: &[Vec<u8>]) {
        for rank in 1..self.size() {
            send(wire, rank, request);
            following.iter().for_each(|bytes| wire.send(rank, bytes));
        }
    }

    /// A reply of each. The error is that of the first rank that failed.
    fn replies_of_all(&self, wire: &dyn Wire) -> Result<Vec<Reply>> {
        let replies: Vec<Reply> = (1..self.size()).map(|rank| read(&wait_for(wire, rank))).collect();
        succeeded(replies)
    }

    /// Asks every other rank while this one does its own part. Completions are sent on as they come.
    fn ask<T: Send>(
        &self,
        request: impl Fn(usize) -> Request,
        own: impl FnOnce() -> Result<T> + Send,
        finished: Option<&UnboundedSender<Completion>>,
        cancel: Option<&CancellationToken>,
    ) -> Result<(T, Vec<Reply>)> {
        let wire = self.ranks.wire();
        let wire = &**wire;
        (1..self.size()).for_each(|rank| send(wire, rank, &request(rank)));
        let (own, replies) = std::thread::scope(|scope| {
            let own = scope.spawn(own);
            let mut replies: Vec<Option<Reply>> = (1..self.size()).map(|_| None).collect();
            let (mut pause, mut cancelled) = (Pause::default(), false);
            while replies.iter().any(Option::is_none) {
                if !cancelled && cancel.is_some_and(CancellationToken::is_cancelled) {
                    self.to_all(wire, &Request::Cancel, &[]);
                    cancelled = true;
                }
                let mut quiet = true;
                for (index, reply) in replies.iter_mut().enumerate().filter(|(_, reply)| reply.is_none()) {
                    let Some(bytes) = wire.try_receive(index + 1) else { continue };
                    quiet = false;
                    match read(&bytes) {
                        Reply::Completed(completion) => {
                            let _ = finished.map(|finished| finished.send(completion)); // the caller may have been dropped
                        }
                        other => *reply = Some(other),
                    }
                }
                if quiet {
                    pause.sleep();
                } else {
                    pause = Pause::default();
                }
            }
            (own.join().unwrap_or_else(|panic| resume_unwind(panic)), replies.into_iter().flatten().collect())
        });
        let own = own?;
        Ok((own, succeeded(replies)?))
    }

    /// Completions of requests; `parts` are those of each rank.
    pub fn generate(
        &self,
        member: &mut Member,
        (requests, parts): (&[Prompt], &[Range<usize>]),
        options: &Options,
        keep_tokens: usize,
        finished: &UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let request = |rank: usize| Request::Generate {
            model: self.model,
            requests: requests[parts[rank].clone()].iter().map(|r| (r.id, r.prompt.clone())).collect(),
            options: options.clone(),
            keep_tokens,
        };
        let own = requests[parts[0].clone()].to_vec();
        let own = || member.generate(own, options, keep_tokens, finished, cancel);
        self.ask(request, own, Some(finished), Some(cancel)).map(drop)
    }

    /// Log-probabilities, one row for each sequence.
    pub fn logprobs(
        &self,
        tokens: &[Tokens],
        parts: &[Range<usize>],
        temperature: f64,
        own: impl FnOnce() -> Result<Vec<Vec<f32>>> + Send,
    ) -> Result<Vec<Vec<f32>>> {
        let model = self.model;
        self.rows(own, |rank| Request::Logprobs { model, tokens: tokens[parts[rank].clone()].to_vec(), temperature })
    }

    /// Values, one row for each sequence.
    pub fn values(
        &self,
        tokens: &[Tokens],
        parts: &[Range<usize>],
        own: impl FnOnce() -> Result<Vec<Vec<f32>>> + Send,
    ) -> Result<Vec<Vec<f32>>> {
        let model = self.model;
        self.rows(own, |rank| Request::Values { model, tokens: tokens[parts[rank].clone()].to_vec() })
    }

    fn rows(
        &self,
        own: impl FnOnce() -> Result<Vec<Vec<f32>>> + Send,
        request: impl Fn(usize) -> Request,
    ) -> Result<Vec<Vec<f32>>> {
        let (mut rows, replies) = self.ask(request, own, None, None)?;
        for reply in replies {
            let Reply::Rows(more) = reply else { return Err(unexpected()) };
            rows.extend(more);
        }
        Ok(rows)
    }

    /// Scores of sequences.
    pub fn scores(
        &self,
        tokens: &[Tokens],
        parts: &[Range<usize>],
        own: impl FnOnce() -> Result<Vec<f32>> + Send,
    ) -> Result<Vec<f32>> {
        let request = |rank: usize| Request::Scores { model: self.model, tokens: tokens[parts[rank].clone()].to_vec() };
        let (mut numbers, replies) = self.ask(request, own, None, None)?;
        for reply in replies {
            let Reply::Numbers(more) = reply else { return Err(unexpected()) };
            numbers.extend(more);
        }
        Ok(numbers)
    }

    /// Log-likelihoods of sequences.
    pub fn likelihoods(
        &self,
        sequences: &[MaskedSequence],
        parts: &[Range<usize>],
        own: impl FnOnce() -> Result<Vec<f64>> + Send,
    ) -> Result<Vec<f64>> {
        let part = |rank: usize| sequences[parts[rank].clone()].to_vec();
        let request = |rank: usize| Request::Likelihoods { model: self.model, sequences: part(rank) };
        let (mut sums, replies) = self.ask(request, own, None, None)?;
        for reply in replies {
            let Reply::Sums(more) = reply else { return Err(unexpected()) };
            sums.extend(more);
        }
        Ok(sums)
    }

    /// The sums of every rank's leaves: this rank's with gradients, those of the others without. And who has gradients.
    pub fn gradients(
        &self,
        member: &mut Member,
        batch: &UpdateBatch,
        parts: &[Range<usize>],
        cancel: &CancellationToken,
    ) -> Result<(RankSums, Vec<RankSums>, Vec<Vec<Node>>)> {
        let objective: Portable = batch.objective.portable().ok_or_else(|| {
            Error::Data(
                "the objective cannot leave its process (`Objective::portable`), which members in other processes need"
                    .into(),
            )
        })?;
        let request = |rank: usize| Request::Gradients {
            model: self.model,
            objective: objective.clone(),
            temperature: batch.temperature,
            leaves: parts[rank].clone(),
        };
        let (own, replies) =
            self.ask(request, || member.gradients(batch, parts[0].clone(), cancel), None, Some(cancel))?;
        let mut nodes = vec![own.iter().map(|(range, sum)| (range.clone(), sum.gradients.is_some())).collect()];
        let mut others = Vec::new();
        for reply in replies {
            let Reply::Gradients(sums) = reply else { return Err(unexpected()) };
            nodes.push(sums.iter().map(|sum| sum.node.clone()).collect());
            others.push(sums.into_iter().map(NodeSum::into_leaf).collect());
        }
        Ok((own, others, nodes))
    }

    /// Adds the gradients of all ranks; this rank's part of them, and the global norm.
    pub fn sum(&self, member: &Member, leaves: usize, own: RankSums, nodes: Vec<Vec<Node>>) -> Result<(Exchange, f64)> {
        let wire = self.ranks.wire();
        self.to_all(&**wire, &Request::Sum { model: self.model, nodes: nodes.clone() }, &[]);
        let (exchange, squares) = Exchange::sum(&**wire, member, leaves, own, &nodes)?;
        let mut all = vec![squares];
        for reply in self.replies_of_all(&**wire)? {
            let Reply::Squares(squares) = reply else { return Err(unexpected()) };
            all.push(squares);
        }
        let norm = exchange.norm(&all);
        Ok((exchange, norm))
    }

    /// Updates the weights of all ranks.
    pub fn update(&self, member: &mut Member, exchange: Exchange, learning_rate: f64, scale: f64) -> Result<()> {
        let wire = self.ranks.wire();
        self.to_all(&**wire, &Request::Update { model: self.model, learning_rate, scale }, &[]);
        let own = exchange.update(&**wire, member, learning_rate, scale);
        let others = self.replies_of_all(&**wire);
        own?;
        others.map(drop)
    }

    /// The moments that every rank holds, from rank 1 on.
    pub fn moments(&self) -> Result<Vec<std::collections::BTreeMap<String, candle_core::Tensor>>> {
        let wire = self.ranks.wire();
        let mut all = Vec::new();
        for rank in 1..self.size() {
            send(&**wire, rank, &Request::Moments { model: self.model });
            match read(&wait_for(&**wire, rank)) {
                Reply::Tensors(described) => all.push(tensors::receive(&**wire, rank, described)?),
                Reply::Failed(failure) => return Err(failure.into_error(rank)),
                _ => return Err(unexpected()),
            }
        }
        Ok(all)
    }

    /// Returns to a snapshot.
    pub fn restore(&self, snapshot: &ModelSnapshot) -> Result<()> {
        let (described, bytes) = described(&snapshot.tensors)?;
        let (version, optimizer_steps) = (snapshot.version, snapshot.optimizer_steps);
        let wire = self.ranks.wire();
        let request = Request::Restore { model: self.model, version, optimizer_steps, tensors: described };
        self.to_all(&**wire, &request, &bytes);
        self.replies_of_all(&**wire).map(drop)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        let wire = self.ranks.wire();
        self.to_all(&**wire, &Request::Drop { model: self.model }, &[]);
    }
}

impl NodeSum {
    fn into_leaf(self) -> (Range<usize>, LeafSum) {
        let Self { node: (range, _), loss, tokens, times, stats } = self;
        (range, LeafSum::received(loss, tokens, times, stats))
    }

    pub(super) fn of(range: &Range<usize>, sum: &LeafSum) -> Self {
        let node = (range.clone(), sum.gradients.is_some());
        Self { node, loss: sum.loss, tokens: sum.tokens, times: sum.times, stats: sum.named_sums() }
    }
}

/// The replies of the ranks from 1 on, or the first failure.
fn succeeded(replies: Vec<Reply>) -> Result<Vec<Reply>> {
    let one = |(index, reply)| match reply {
        Reply::Failed(failure) => Err(failure.into_error(index + 1)),
        reply => Ok(reply),
    };
    replies.into_iter().enumerate().map(one).collect()
}

fn unexpected() -> Error {
    Error::Data("a rank gave an answer to another question; all ranks must run the same build".into())
}
