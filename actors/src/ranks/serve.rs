//! The other ranks' side: answers rank 0 until it says that it ends.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rehearsal_lm::generate::{Completion, Request as Prompt};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use super::Wire;
use super::exchange::Exchange;
use super::message::{Failure, MemberConfig, NodeSum, Pause, Reply, Request, read, send, wait_for};
use super::tensors::{self, described};
use crate::files::{Described, ModelFiles};
use crate::role::panic_text;
use crate::trained::{LeafSum, Member, TrainedConfig, UpdateBatch};
use crate::{Devices, Error, ModelSnapshot, Placement, Result, passes};

/// A member of one model.
struct Held {
    member: Member,
    config: MemberConfig,
    /// The sums of its leaves, until all ranks add them.
    own: Vec<(Range<usize>, LeafSum)>,
    /// Its part of the gradients, until the update.
    exchange: Option<Exchange>,
}

/// Answers rank 0 with `threads` CPU threads (0 for one for each core) until it ends the ranks.
///
/// # Errors
///
/// [`Error::Placement`] if the threads cannot be started, and what goes wrong while all ranks work together: the process must then
/// end, so that the others do not wait for it.
pub fn serve(wire: &dyn Wire, threads: usize) -> Result<()> {
    let devices = Devices::new(threads)?;
    let mut models: BTreeMap<u32, Held> = BTreeMap::new();
    loop {
        let request: Request = read(&wait_for(wire, 0));
        match request {
            Request::Stop => return Ok(()),
            Request::Cancel => {} // of a request that is answered
            Request::Drop { model } => drop(models.remove(&model)),
            Request::Build { model, files, parameters, config } => {
                let built = build(wire, &devices, &files, parameters, config);
                let reply = built.map(|held| {
                    models.insert(model, held);
                    Reply::Done
                });
                answer(wire, reply);
            }
            Request::Sum { model, nodes } => {
                let held = find(&mut models, model)?;
                let own = std::mem::take(&mut held.own);
                let (exchange, squares) = Exchange::sum(wire, &held.member, held.config.leaves, own, &nodes)?;
                held.exchange = Some(exchange);
                send(wire, 0, &Reply::Squares(squares));
            }
            Request::Update { model, learning_rate, scale } => {
                let held = find(&mut models, model)?;
                let sum = held.exchange.take().ok_or_else(|| Error::Data("there is no sum of gradients".into()))?;
                let updated = sum.update(wire, &mut held.member, learning_rate, scale);
                answer(wire, updated.map(|()| Reply::Done));
            }
            Request::Moments { model } => {
                let (described, bytes) = described(&find(&mut models, model)?.member.moments())?;
                send(wire, 0, &Reply::Tensors(described));
                bytes.iter().for_each(|bytes| wire.send(0, bytes));
            }
            Request::Restore { model, version, optimizer_steps, tensors } => {
                let tensors = tensors::receive(wire, 0, tensors)?;
                let snapshot = ModelSnapshot { version, optimizer_steps, tensors };
                answer(wire, find(&mut models, model)?.member.restore(&snapshot).map(|()| Reply::Done));
            }
            alone => {
                let model = alone.model();
                let held = find(&mut models, model)?;
                let reply = attend(wire, |finished, cancel| held.work(alone, finished, cancel));
                if let Reply::Failed(Failure::Died(_)) = &reply {
                    models.remove(&model);
                }
                send(wire, 0, &reply);
            }
        }
    }
}

fn find(models: &mut BTreeMap<u32, Held>, model: u32) -> Result<&mut Held> {
    models.get_mut(&model).ok_or_else(|| Error::Data(format!("this rank has no member of model {model}")))
}

fn answer(wire: &dyn Wire, reply: Result<Reply>) {
    send(wire, 0, &reply.unwrap_or_else(|error| Reply::Failed(Failure::of(&error))));
}

fn build(
    wire: &dyn Wire,
    devices: &Devices,
    files: &ModelFiles,
    parameters: Vec<Described>,
    config: MemberConfig,
) -> Result<Held> {
    let parameters = tensors::receive(wire, 0, parameters)?;
    let checkpoint = files.checkpoint(parameters)?;
    let trained = TrainedConfig {
        placements: vec![Placement::Cpu],
        leaves: config.leaves,
        shard: config.shard,
        optimizer: config.optimizer,
        max_grad_norm: None,
        micro_batch_tokens: config.micro_batch_tokens,
        precision: config.precision(),
        gradient_checkpointing: config.gradient_checkpointing,
        ema_decay: config.ema_decay,
        lora: config.lora.clone(),
    };
    let shard = config.shard.then(|| (wire.rank(), wire.size()));
    let member = Member::new(Arc::new(checkpoint), trained, devices.get(Placement::Cpu)?, shard)?;
    Ok(Held { member, config, own: Vec::new(), exchange: None })
}

/// Does some work on a thread of its own. Meanwhile sends its completions to rank 0, and ends it when rank 0 says so.
fn attend(
    wire: &dyn Wire,
    work: impl FnOnce(&UnboundedSender<Completion>, &CancellationToken) -> Result<Reply> + Send,
) -> Reply {
    let (finished, mut completions) = unbounded_channel();
    let cancel = CancellationToken::new();
    std::thread::scope(|scope| {
        let of_work = cancel.clone();
        let working = scope.spawn(move || catch_unwind(AssertUnwindSafe(|| work(&finished, &of_work))));
        let mut pause = Pause::default();
        loop {
            let over = working.is_finished();
            while let Ok(completion) = completions.try_recv() {
                send(wire, 0, &Reply::Completed(completion));
                pause = Pause::default();
            }
            if over {
                break;
            }
            if let Some(bytes) = wire.try_receive(0)
                && let Request::Cancel = read(&bytes)
            {
                cancel.cancel();
            }
            pause.sleep();
        }
        match working.join() {
            Ok(Ok(Ok(reply))) => reply,
            Ok(Ok(Err(error))) => Reply::Failed(Failure::of(&error)),
            Ok(Err(panic)) | Err(panic) => Reply::Failed(Failure::Died(panic_text(&*panic))),
        }
    })
}

impl Held {
    /// Answers what a rank does by itself.
    fn work(
        &mut self,
        request: Request,
        finished: &UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<Reply> {
        let (member, budget) = (&mut self.member, self.config.micro_batch_tokens);
        Ok(match request {
            Request::Generate { requests, options, keep_tokens, .. } => {
                let mut prompts: Vec<Prompt> = Vec::with_capacity(requests.len());
                for (id, prompt) in requests {
                    // Neighbours with the same prompt share it.
                    let shared = prompts.last().map(|last| last.prompt.clone()).filter(|last| *last == prompt);
                    prompts.push(Prompt { id, prompt: shared.unwrap_or(prompt) });
                }
                member.generate(prompts, &options, keep_tokens, finished, cancel)?;
                Reply::Done
            }
            Request::Logprobs { tokens, temperature, .. } => Reply::Rows(member.logprobs(&tokens, temperature)?),
            Request::Values { tokens, .. } => {
                Reply::Rows(member.compute.run(|| passes::values(&member.decoder, &tokens, budget))?)
            }
            Request::Scores { tokens, .. } => {
                Reply::Numbers(member.compute.run(|| passes::scores(&member.decoder, &tokens, budget))?)
            }
            Request::Likelihoods { sequences, .. } => {
                Reply::Sums(member.compute.run(|| passes::likelihoods(&member.decoder, &sequences, budget))?)
            }
            Request::Gradients { objective, temperature, leaves, .. } => {
                (self.own, self.exchange) = (Vec::new(), None);
                let batch = UpdateBatch { objective: objective.into_objective(), learning_rate: 0.0, temperature };
                self.own = member.gradients(&batch, leaves, cancel)?;
                Reply::Gradients(self.own.iter().map(|(range, sum)| NodeSum::of(range, sum)).collect())
            }
            _ => return Err(Error::Data("a request that no rank answers by itself".into())),
        })
    }
}

impl Request {
    /// The model that a request is about.
    fn model(&self) -> u32 {
        match self {
            Self::Build { model, .. }
            | Self::Drop { model }
            | Self::Generate { model, .. }
            | Self::Logprobs { model, .. }
            | Self::Likelihoods { model, .. }
            | Self::Values { model, .. }
            | Self::Scores { model, .. }
            | Self::Gradients { model, .. }
            | Self::Sum { model, .. }
            | Self::Update { model, .. }
            | Self::Moments { model }
            | Self::Restore { model, .. } => *model,
            Self::Cancel | Self::Stop => 0,
        }
    }
}
