//! The policy: the trained weights, their optimiser and the sampler.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor, Var};
use rehearsal_learn::{
    AdamW, AdamWConfig, PreferenceConfig, PreferenceLogprobs, clip_scale, global_norm, preference_loss, token,
};
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Batch, Checkpoint, Decoder, Gradients, Precision};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::device::Seat;
use crate::reference::frozen_logprobs;
use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::{Devices, Error, Placement, Result, Tokens};

/// Settings of the policy that do not change during a job.
#[derive(Debug, Clone, Copy)]
pub struct PolicyConfig {
    pub placement: Placement,
    pub optimizer: AdamWConfig,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: Option<f64>,
    /// Tokens of a micro-batch at most; a pair is never split.
    pub micro_batch_tokens: usize,
    /// What the factors of matrix products are rounded to; the weights stay f32.
    pub precision: Precision,
    /// Activations are computed again on the way back instead of kept.
    pub gradient_checkpointing: bool,
}

/// A preferred and a dispreferred completion of one prompt.
#[derive(Debug, Clone)]
pub struct PairTokens {
    pub chosen: Tokens,
    pub rejected: Tokens,
    /// Log-probabilities when they were sampled, token by token.
    pub sampler_chosen: Vec<f32>,
    pub sampler_rejected: Vec<f32>,
    /// Log-probabilities under the reference, token by token.
    pub ref_chosen: Vec<f32>,
    pub ref_rejected: Vec<f32>,
}

/// One optimiser step's worth of pairs.
#[derive(Debug, Clone)]
pub struct UpdateBatch {
    pub pairs: Vec<PairTokens>,
    pub loss: PreferenceConfig,
    pub learning_rate: f64,
    /// Temperature of all log-probabilities, as they were sampled.
    pub temperature: f64,
}

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTimes {
    pub forward: Duration,
    pub backward: Duration,
    pub optimizer: Duration,
}

/// What an optimiser step did; means over pairs unless said otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReport {
    pub version: u64,
    pub pairs: usize,
    /// Tokens that went through forward and backward.
    pub tokens: usize,
    pub loss: f64,
    /// Share of pairs whose implicit reward prefers the chosen one.
    pub accuracy: f64,
    /// β (a - b): implicit reward of the chosen minus that of the rejected.
    pub margin: f64,
    pub chosen_reward: f64,
    pub rejected_reward: f64,
    pub chosen_logprob: f64,
    pub rejected_logprob: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// k3 estimate of KL(sampler ‖ trainer) per token: rounding noise when both agree.
    pub mismatch_kl: f64,
    pub times: StepTimes,
}

/// Weights and optimiser, sharing storage with the policy: save it before the next step.
#[derive(Clone)]
pub struct PolicySnapshot {
    pub version: u64,
    pub optimizer_steps: u64,
    /// `policy.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`.
    pub tensors: BTreeMap<String, Tensor>,
}

pub(crate) enum PolicyMsg {
    Generate {
        requests: Vec<Request>,
        options: Box<Options>,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
        _ticket: Ticket,
        reply: Reply<()>,
    },
    Logprobs {
        tokens: Vec<Tokens>,
        temperature: f64,
        _ticket: Ticket,
        reply: Reply<Vec<Vec<f32>>>,
    },
    Step {
        batch: Box<UpdateBatch>,
        cancel: CancellationToken,
        _ticket: Ticket,
        reply: Reply<StepReport>,
    },
    Snapshot {
        _ticket: Ticket,
        reply: Reply<PolicySnapshot>,
    },
    Restore {
        snapshot: Box<PolicySnapshot>,
        _ticket: Ticket,
        reply: Reply<()>,
    },
    Export {
        directory: std::path::PathBuf,
        dtype: DType,
        _ticket: Ticket,
        reply: Reply<()>,
    },
}
local_message!(PolicyMsg);

/// The policy's machine.
pub(crate) struct Policy {
    checkpoint: Arc<Checkpoint>,
    seat: Seat,
    config: PolicyConfig,
    decoder: Decoder,
    optimizer: AdamW,
    version: u64,
    /// Packed weights of the current version, made when needed and dropped before an update.
    generator: Option<Generator>,
}

impl Policy {
    pub fn new(checkpoint: Arc<Checkpoint>, config: PolicyConfig, devices: &Devices) -> Result<Self> {
        let seat = devices.seat(config.placement)?;
        let decoder = checkpoint
            .trainable(&seat.device, DType::F32)?
            .with_precision(config.precision)
            .with_gradient_checkpointing(config.gradient_checkpointing);
        let optimizer = AdamW::new(decoder.variables(), config.optimizer)?;
        Ok(Self { checkpoint, seat, config, decoder, optimizer, version: 0, generator: None })
    }

    fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        finished: UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let mut generator = match self.generator.take() {
            Some(generator) => generator,
            None => self.seat.run(|| Generator::new(&self.decoder))?,
        };
        let text = &self.checkpoint.text;
        let result = self.seat.run(|| {
            generator.generate(requests, options, Some(text), &|| cancel.is_cancelled(), &mut |completion| {
                let _ = finished.send(completion); // a caller that has gone needs no more
            })
        });
        self.generator = Some(generator);
        Ok(result?)
    }

    fn step(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        self.generator = None;
        let seat = self.seat.clone();
        seat.run(|| self.update(batch, cancel))
    }

    fn update(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        let mut sums = Sums::default();
        let mut gradients = Gradients::default();
        for pairs in micro_batches(&batch.pairs, self.config.micro_batch_tokens) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            micro_step(&self.decoder, pairs, batch, &mut gradients, &mut sums)?;
        }
        let start = Instant::now();
        let gradients = gradients.complete(&self.decoder)?;
        let grad_norm = global_norm(&gradients)?;
        let mut report = sums.report(batch.pairs.len());
        for (what, value) in [("loss", report.loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what, value });
            }
        }
        let scale = clip_scale(grad_norm, self.config.max_grad_norm);
        self.optimizer.step(self.decoder.variables(), &gradients, batch.learning_rate, scale)?;
        self.version += 1;
        report.times.optimizer = start.elapsed();
        Ok(StepReport { version: self.version, grad_norm, ..report })
    }

    fn snapshot(&self) -> PolicySnapshot {
        let weights = self.decoder.parameters().into_iter().map(|(name, t)| (format!("policy.{name}"), t));
        let moments = self.optimizer.state().into_iter().map(|(name, t)| (format!("optimizer.{name}"), t));
        PolicySnapshot {
            version: self.version,
            optimizer_steps: self.optimizer.steps(),
            tensors: weights.chain(moments).collect(),
        }
    }

    fn restore(&mut self, snapshot: &PolicySnapshot) -> Result<()> {
        self.generator = None;
        let missing = |name: &str| rehearsal_learn::Error::Moments(format!("the snapshot has no `{name}`"));
        for (name, var) in self.decoder.variables() {
            let name = format!("policy.{name}");
            let tensor = snapshot.tensors.get(&name).ok_or_else(|| missing(&name))?;
            var.set(&tensor.to_device(&self.seat.device)?.to_dtype(var.dtype())?)?;
        }
        let prefix = "optimizer.";
        let moments =
            snapshot.tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_string(), t.clone())));
        self.optimizer.restore(snapshot.optimizer_steps, &moments.collect())?;
        self.version = snapshot.version;
        Ok(())
    }
}

impl Machine for Policy {
    type Message = PolicyMsg;

    fn apply(&mut self, message: PolicyMsg) {
        match message {
            PolicyMsg::Generate { requests, options, finished, cancel, reply, .. } => {
                answer(reply, self.generate(requests, &options, finished, &cancel))
            }
            PolicyMsg::Logprobs { tokens, temperature, reply, .. } => {
                let budget = self.config.micro_batch_tokens;
                answer(reply, self.seat.run(|| frozen_logprobs(&self.decoder, &tokens, temperature, budget)))
            }
            PolicyMsg::Step { batch, cancel, reply, .. } => answer(reply, self.step(&batch, &cancel)),
            PolicyMsg::Snapshot { reply, .. } => answer(reply, Ok(self.snapshot())),
            PolicyMsg::Restore { snapshot, reply, .. } => answer(reply, self.restore(&snapshot)),
            PolicyMsg::Export { directory, dtype, reply, .. } => {
                answer(reply, self.checkpoint.save(&self.decoder.parameters(), &directory, dtype).map_err(Error::from))
            }
        }
    }
}

/// Consecutive pairs of at most `budget` tokens together, and at least one pair.
fn micro_batches(pairs: &[PairTokens], budget: usize) -> impl Iterator<Item = &[PairTokens]> {
    let size = |p: &PairTokens| {
        // A pair shares its prompt.
        p.chosen.prompt.len() + p.chosen.completion.len() + p.rejected.completion.len()
    };
    let mut rest = pairs;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fitting = rest.iter().take_while(|p| {
            tokens += size(p);
            tokens <= budget
        });
        let n = fitting.count().max(1).min(rest.len());
        let (now, later) = rest.split_at(n);
        rest = later;
        (!now.is_empty()).then_some(now)
    })
}

/// Statistics summed over micro-batches.
#[derive(Default)]
struct Sums {
    loss: f64,
    correct: f64,
    chosen_reward: f64,
    rejected_reward: f64,
    chosen_logprob: f64,
    rejected_logprob: f64,
    mismatch: f64,
    scored: usize,
    tokens: usize,
    times: StepTimes,
}

impl Sums {
    fn report(&self, pairs: usize) -> StepReport {
        let mean = |sum: f64| sum / pairs as f64;
        StepReport {
            version: 0,
            grad_norm: 0.0,
            pairs,
            tokens: self.tokens,
            loss: mean(self.loss),
            accuracy: mean(self.correct),
            margin: mean(self.chosen_reward - self.rejected_reward),
            chosen_reward: mean(self.chosen_reward),
            rejected_reward: mean(self.rejected_reward),
            chosen_logprob: mean(self.chosen_logprob),
            rejected_logprob: mean(self.rejected_logprob),
            mismatch_kl: self.mismatch / self.scored.max(1) as f64,
            times: self.times,
        }
    }
}

/// Adds the gradient of `Σ loss / all pairs` over some of the pairs.
fn micro_step(
    decoder: &Decoder,
    pairs: &[PairTokens],
    batch: &UpdateBatch,
    gradients: &mut Gradients,
    sums: &mut Sums,
) -> Result<()> {
    let start = Instant::now();
    // A pair's completions stand side by side, so that they share their prompt.
    let packed = Batch::new(pairs.iter().flat_map(|p| [p.chosen.sequence(), p.rejected.sequence()]));
    let forward = decoder.forward(&packed, batch.temperature)?;
    let logprobs = Var::from_tensor(&forward.output())?;
    let device = logprobs.device().clone();
    let per_sequence = token::span_sums(&logprobs, packed.spans())?;
    let half = |t: &Tensor, which: usize| t.reshape((pairs.len(), 2))?.narrow(1, which, 1)?.squeeze(1);
    let column = |values: Vec<f32>| Tensor::new(values, &device);
    let sum = |x: &Vec<f32>| x.iter().map(|&x| x as f64).sum::<f64>() as f32;
    let lengths: Vec<f32> = packed.spans().windows(2).map(|w| (w[1] - w[0]) as f32).collect();
    let lengths = column(lengths)?;
    let (chosen, rejected) = (half(&per_sequence, 0)?, half(&per_sequence, 1)?);
    let loss = preference_loss(
        &PreferenceLogprobs {
            policy_chosen: &chosen,
            policy_rejected: &rejected,
            ref_chosen: &column(pairs.iter().map(|p| sum(&p.ref_chosen)).collect())?,
            ref_rejected: &column(pairs.iter().map(|p| sum(&p.ref_rejected)).collect())?,
            chosen_tokens: &half(&lengths, 0)?,
            rejected_tokens: &half(&lengths, 1)?,
            score_gap: None,
        },
        &batch.loss,
    )?;
    let mean = (loss.losses.sum_all()? / batch.pairs.len() as f64)?;
    let numbers = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(DType::F64)?.to_vec1()?) };
    let total = |t: &Tensor| -> Result<f64> { Ok(numbers(t)?.iter().sum()) };
    sums.loss += total(&loss.losses)?;
    sums.correct += numbers(&loss.margins()?)?.iter().filter(|&&m| m > 0.0).count() as f64;
    sums.chosen_reward += total(&loss.chosen_rewards)?;
    sums.rejected_reward += total(&loss.rejected_rewards)?;
    sums.chosen_logprob += total(&chosen)?;
    sums.rejected_logprob += total(&rejected)?;
    let sampled = pairs.iter().flat_map(|p| [&p.sampler_chosen, &p.sampler_rejected]).flatten();
    for (old, sampler) in numbers(&logprobs)?.iter().zip(sampled) {
        let d = old - *sampler as f64;
        sums.mismatch += d.exp_m1() - d;
    }
    sums.scored += packed.scored();
    sums.tokens += packed.tokens();
    sums.times.forward += start.elapsed();

    let start = Instant::now();
    let grad = mean
        .backward()?
        .remove(&logprobs)
        .ok_or_else(|| rehearsal_lm::Error::NoGradient("(log-probabilities)".into()))?;
    forward.backward(&grad, gradients)?;
    sums.times.backward += start.elapsed();
    Ok(())
}

/// Speaks to the policy.
#[derive(Clone)]
pub struct PolicyHandle {
    pub(crate) link: Link<PolicyMsg>,
}

impl PolicyHandle {
    pub(crate) fn build(checkpoint: Arc<Checkpoint>, config: PolicyConfig, devices: Devices) -> Build<Policy> {
        Arc::new(move || Policy::new(checkpoint.clone(), config, &devices))
    }

    /// Generates; each completion is sent to `finished` as it ends. Ends early, with [`Error::Cancelled`], when
    /// `cancel` is.
    pub async fn generate(
        &self,
        requests: Vec<Request>,
        options: Options,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
    ) -> Result<()> {
        self.link
            .ask(|_ticket, reply| PolicyMsg::Generate {
                requests,
                options: Box::new(options),
                finished,
                cancel,
                _ticket,
                reply,
            })
            .await
    }

    /// Log-probabilities of completions, token by token, under the current weights.
    pub async fn logprobs(&self, tokens: Vec<Tokens>, temperature: f64) -> Result<Vec<Vec<f32>>> {
        self.link.ask(|_ticket, reply| PolicyMsg::Logprobs { tokens, temperature, _ticket, reply }).await
    }

    /// One optimiser step. When it fails, the weights are as before.
    pub async fn step(&self, batch: UpdateBatch, cancel: CancellationToken) -> Result<StepReport> {
        self.link.ask(|_ticket, reply| PolicyMsg::Step { batch: Box::new(batch), cancel, _ticket, reply }).await
    }

    /// Weights and optimiser as they are; they share storage with the policy.
    pub async fn snapshot(&self) -> Result<PolicySnapshot> {
        self.link.ask(|_ticket, reply| PolicyMsg::Snapshot { _ticket, reply }).await
    }

    /// Goes back to a snapshot.
    pub async fn restore(&self, snapshot: PolicySnapshot) -> Result<()> {
        self.link.ask(|_ticket, reply| PolicyMsg::Restore { snapshot: Box::new(snapshot), _ticket, reply }).await
    }

    /// Writes the weights as a Hugging Face directory.
    pub async fn export(&self, directory: std::path::PathBuf, dtype: DType) -> Result<()> {
        self.link.ask(|_ticket, reply| PolicyMsg::Export { directory, dtype, _ticket, reply }).await
    }
}
role_status!(PolicyHandle);

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(tokens: usize) -> PairTokens {
        let of = |n| Tokens { prompt: Arc::new(vec![0; 1]), completion: Arc::new(vec![0; n - 1]) };
        PairTokens {
            chosen: of(tokens / 2),
            rejected: of(tokens - tokens / 2),
            sampler_chosen: Vec::new(),
            sampler_rejected: Vec::new(),
            ref_chosen: Vec::new(),
            ref_rejected: Vec::new(),
        }
    }

    #[test]
    fn micro_batches_fill_the_budget_and_split_no_pair() {
        let pairs: Vec<PairTokens> = [40, 50, 30, 200, 10, 90].into_iter().map(pair).collect();
        let sizes: Vec<usize> = micro_batches(&pairs, 100).map(<[PairTokens]>::len).collect();
        assert_eq!(sizes, [2, 1, 1, 2]);
        assert_eq!(micro_batches(&pairs, usize::MAX).count(), 1);
        assert_eq!(micro_batches(&[], 100).count(), 0);
    }
}
