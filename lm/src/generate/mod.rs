//! Generation with continuous batching: a finished sequence leaves, the next prompt takes its slot.
//!
//! A completion is a function of (weights, prompt, seed, rollout id, settings) alone. Batch size, order, thread
//! count and the neighbours in a batch change nothing: rows are batch-invariant ([`rehearsal_kernels`]), and random
//! numbers are addressed by rollout and position ([`rehearsal_kernels::random`]).

mod cache;
mod cpu;
mod gpu;
mod plain;
mod sampling;

pub use sampling::{Sampling, Scratch};

use std::collections::VecDeque;
use std::sync::Arc;

use rehearsal_kernels::head::logprob;
use rehearsal_kernels::math::log_sum_exp;
use rehearsal_kernels::random::Stream;
use rehearsal_kernels::team::{for_each_chunk, with_team};

use crate::cpu::{Recorder, Recording, Trail};
use crate::error::{Error, Result};
use crate::forward::{Machine, machine};
use crate::model::Decoder;
use crate::text::Text;
use cache::{Cache, Row};
use cpu::{PackedWeights, Room};
use gpu::GpuGenerator;

/// One completion to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Addresses the random numbers; unique in a run.
    pub id: u64,
    /// Tokens of the prompt; completions of one prompt share it when they are asked for side by side.
    pub prompt: Arc<Vec<u32>>,
}

/// Settings shared by the completions of a call.
#[derive(Debug, Clone)]
pub struct Options {
    pub sampling: Sampling,
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// No end-of-sequence token before this many.
    pub min_new_tokens: usize,
    /// Tokens that end a completion; they are part of it.
    pub eos: Vec<u32>,
    /// Texts that end a completion; its text stops before them, its tokens include them.
    pub stop: Vec<String>,
    /// Seed of the run.
    pub seed: u64,
    /// Sequences in flight at most.
    pub batch: usize,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token.
    #[default]
    Eos,
    /// A stop text.
    Stop,
    /// The token limit.
    Length,
}

/// A finished completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    pub id: u64,
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the unfiltered distribution at the sampling temperature.
    pub logprobs: Vec<f32>,
    pub finish: Finish,
}

/// Prompt tokens that go through the model in one pass, so that a long prompt does not hold up the others.
const PREFILL_ROWS: usize = 512;

enum Backend {
    Packed(Box<PackedBackend>),
    Plain { cache: plain::PlainCache },
    Gpu(Box<GpuGenerator>),
}

/// Weights of one version with the buffers and cache that passes reuse.
struct PackedBackend {
    weights: PackedWeights,
    room: Room,
    cache: Cache,
}

/// Generates from the weights a decoder had when this was made.
pub struct Generator {
    decoder: Decoder,
    backend: Backend,
    /// What the call under way computes, if it is to be kept.
    recorder: Option<Recorder>,
}

struct Active {
    request: Request,
    slot: usize,
    /// Tokens whose keys and values are in the cache.
    cached: usize,
    stream: Stream,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Log-sum-exp of the logits that each token was drawn from.
    lse: Vec<f32>,
    trail: Trail,
    scratch: Scratch,
}

impl Active {
    /// A sequence that begins, with so many tokens of its prompt in the cache.
    fn new(request: Request, slot: usize, cached: usize, seed: u64) -> Self {
        let stream = Stream::new(seed, request.id);
        Self {
            request,
            slot,
            cached,
            stream,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            lse: Vec::new(),
            trail: Trail::default(),
            scratch: Scratch::default(),
        }
    }
}

impl Generator {
    /// Packs the weights (CPU) or uses them in place (other devices).
    pub fn new(decoder: &Decoder) -> Result<Self> {
        let backend = match machine(decoder) {
            Some(Machine::Cpu(_)) => {
                let weights = PackedWeights::new(decoder)?;
                let cache = Cache::new(decoder.architecture(), &[]);
                let room = Room::new(&weights);
                Backend::Packed(Box::new(PackedBackend { weights, room, cache }))
            }
            Some(Machine::Gpu(gpu)) => Backend::Gpu(Box::new(GpuGenerator::new(gpu, decoder)?)),
            None => Backend::Plain { cache: plain::PlainCache::new(decoder, 0) },
        };
        Ok(Self { decoder: decoder.clone(), backend, recorder: None })
    }

    /// Generates every request and hands each completion to `finished` as it ends.
    ///
    /// `text` is needed for stop texts only. When `cancelled` turns true the call ends with [`Error::Cancelled`];
    /// completions handed over by then stand.
    pub fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        text: Option<&Text>,
        cancelled: &dyn Fn() -> bool,
        finished: &mut dyn FnMut(Completion),
    ) -> Result<()> {
        options.sampling.validate()?;
        self.check(&requests, options)?;
        let call = Call { requests, options, text, cancelled, finished };
        match &mut self.backend {
            Backend::Gpu(gpu) => gpu.generate(&self.decoder, call),
            _ => with_team(|| self.generate_on_the_cpu(call)),
        }
    }

    /// [`Generator::generate`], with what was computed of the completions kept for an update on them, `tokens` tokens of
    /// it at most: see [`Decoder::forward_recalled`]. Nothing is kept where there were more, or where a decoder's
    /// passes cannot be recalled (other devices, frozen weights, gradient checkpointing).
    pub fn generate_recorded(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        text: Option<&Text>,
        cancelled: &dyn Fn() -> bool,
        finished: &mut dyn FnMut(Completion),
        tokens: usize,
    ) -> Result<Option<Recording>> {
        if matches!(self.backend, Backend::Packed(_)) && self.decoder.recalls() {
            let temperature = options.sampling.logprob_temperature();
            self.recorder = Some(Recorder::new(&self.decoder, tokens, rows_in_all(&requests, options), temperature));
        }
        let result = self.generate(requests, options, text, cancelled, finished);
        let recorder = self.recorder.take();
        result.map(|()| recorder.map(Recorder::finish))
    }

    fn generate_on_the_cpu(&mut self, Call { requests, options, text, cancelled, finished }: Call<'_>) -> Result<()> {
        let mut slots = Slots::new(&requests, options);
        self.reserve(&slots.lengths);

        let mut waiting: VecDeque<Request> = requests.into();
        let mut active: Vec<Active> = Vec::new();
        while !(waiting.is_empty() && active.is_empty()) {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            self.admit(&mut waiting, &mut slots, &mut active, options)?;
            let rows = rows(&active);
            let mut advance = vec![0; active.len()];
            for (which, _) in &rows {
                advance[*which] += 1;
            }
            let mut wants = vec![false; active.len()];
            for (which, row) in &rows {
                wants[*which] |= row.wants_logits;
            }
            let (owners, rows): (Vec<usize>, Vec<Row>) = rows.into_iter().unzip();
            let vocab = self.decoder.architecture().vocab;
            self.recorder = self.recorder.take().filter(|recorder| recorder.has_room(rows.len()));
            let logits = self.forward(&rows)?;
            let mut drawing: Vec<_> =
                active.iter_mut().zip(wants).filter_map(|(a, wants)| wants.then_some(a)).collect();
            for_each_chunk(&mut drawing, 1, |i, a| a[0].draw(&logits[i * vocab..(i + 1) * vocab], options));
            drop(logits);
            if let Some(recorder) = &self.recorder {
                let mut read = 0..;
                for (i, (&which, row)) in owners.iter().zip(&rows).enumerate() {
                    let read = if row.wants_logits { read.next() } else { None };
                    recorder.note(&mut active[which].trail, i, read);
                }
            }
            for (a, rows) in active.iter_mut().zip(advance) {
                a.cached += rows;
            }
            let mut going = Vec::with_capacity(active.len());
            for a in active {
                match a.finish(options, text)? {
                    Some(finish) => {
                        slots.free.push(a.slot);
                        if let Some(recorder) = &mut self.recorder {
                            recorder.end(&a.request.prompt, &a.tokens, a.trail, &a.logprobs, &a.lse);
                        }
                        finished(Completion { id: a.request.id, tokens: a.tokens, logprobs: a.logprobs, finish });
                    }
                    None => going.push(a),
                }
            }
            active = going;
        }
        Ok(())
    }

    fn check(&self, requests: &[Request], options: &Options) -> Result<()> {
        let arch = self.decoder.architecture();
        for r in requests {
            if r.prompt.is_empty() {
                return Err(Error::EmptyPrompt { id: r.id });
            }
            if let Some(&token) = r.prompt.iter().find(|&&t| t as usize >= arch.vocab) {
                return Err(Error::ForeignToken { token, vocab: arch.vocab });
            }
            let (prompt, new, context) = (r.prompt.len(), options.max_new_tokens, arch.context);
            if prompt + new > context {
                return Err(Error::TooLong { id: r.id, prompt, new, context });
            }
        }
        if options.max_new_tokens == 0 {
            return Err(Error::Sampling("max_new_tokens = 0 must be 1 or more".into()));
        }
        Ok(())
    }

    fn reserve(&mut self, lengths: &[usize]) {
        match &mut self.backend {
            Backend::Packed(packed) if packed.cache.fits(lengths) => {}
            Backend::Packed(packed) => packed.cache = Cache::new(self.decoder.architecture(), lengths),
            Backend::Plain { cache } => *cache = plain::PlainCache::new(&self.decoder, lengths.len()),
            Backend::Gpu(_) => {}
        }
    }

    /// Fills free slots. A request whose prompt another sequence has cached copies it from there; one whose prompt is
    /// on its way waits for it and lets others pass.
    fn admit(
        &mut self,
        waiting: &mut VecDeque<Request>,
        slots: &mut Slots,
        active: &mut Vec<Active>,
        options: &Options,
    ) -> Result<()> {
        while !slots.free.is_empty() {
            // The last prompt token runs again for its logits: the same bits, by batch invariance.
            let shared = |prompt: &Arc<Vec<u32>>| prompt.len() - 1;
            let twin = |r: &Request| active.iter().find(|a| Arc::ptr_eq(&a.request.prompt, &r.prompt));
            let ready = |r: &Request| twin(r).is_none_or(|t| t.cached >= shared(&r.prompt));
            let Some(next) = waiting.iter().position(ready) else { break };
            let Some(slot) = slots.take(length(&waiting[next], options)) else { break };
            let Some(request) = waiting.remove(next) else { break };
            let cached = match twin(&request).map(|t| t.slot) {
                Some(from) => {
                    self.copy_prefix(from, slot, shared(&request.prompt))?;
                    shared(&request.prompt)
                }
                None => 0,
            };
            active.push(Active::new(request, slot, cached, options.seed));
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        match &mut self.backend {
            Backend::Packed(packed) => {
                packed.cache.copy_prefix(self.decoder.architecture().layers, from, to, len);
                Ok(())
            }
            Backend::Plain { cache } => cache.copy_prefix(from, to, len),
            Backend::Gpu(_) => Ok(()),
        }
    }

    fn forward(&mut self, rows: &[Row]) -> Result<std::borrow::Cow<'_, [f32]>> {
        match &mut self.backend {
            Backend::Packed(packed) => {
                let PackedBackend { weights, room, cache } = &mut **packed;
                Ok(cpu::forward(&self.decoder, weights, cache, rows, room, self.recorder.as_mut())?.into())
            }
            Backend::Plain { cache } => Ok(plain::forward(&self.decoder, cache, rows)?.into()),
            Backend::Gpu(_) => Ok(Vec::new().into()),
        }
    }
}

/// What [`Generator::generate`] was given.
struct Call<'a> {
    requests: Vec<Request>,
    options: &'a Options,
    text: Option<&'a Text>,
    cancelled: &'a dyn Fn() -> bool,
    finished: &'a mut dyn FnMut(Completion),
}

/// Tokens of a sequence at most.
fn length(request: &Request, options: &Options) -> usize {
    request.prompt.len() + options.max_new_tokens
}

/// Slots and tokens a slot that a cache of equal slots needs for these requests.
fn room(requests: &[Request], options: &Options) -> (usize, usize) {
    let longest = requests.iter().map(|r| length(r, options)).max().unwrap_or(0);
    (options.batch.clamp(1, requests.len().max(1)), longest)
}

/// Places for the sequences under way.
struct Slots {
    lengths: Vec<usize>,
    free: Vec<usize>,
}

impl Slots {
    /// One for each request, as long as it can become; or as many as there may be, each as long as any can become.
    fn new(requests: &[Request], options: &Options) -> Self {
        let (slots, longest) = room(requests, options);
        let lengths = match slots == requests.len() {
            true => requests.iter().map(|r| length(r, options)).collect(),
            false => vec![longest; slots],
        };
        Self { free: (0..slots).collect(), lengths }
    }

    /// The tightest that fits: so there is one for every request, in whatever order they come.
    fn take(&mut self, length: usize) -> Option<usize> {
        let fitting = self.free.iter().enumerate().filter(|(_, slot)| self.lengths[**slot] >= length);
        let (at, _) = fitting.min_by_key(|(_, slot)| self.lengths[**slot])?;
        Some(self.free.swap_remove(at))
    }
}

/// Rows that go through the model if no completion ends early.
fn rows_in_all(requests: &[Request], options: &Options) -> usize {
    let rows = |i: usize| {
        let prompt = &requests[i].prompt;
        // A twin takes all but the last row of its prompt from the one before.
        let twin = i > 0 && Arc::ptr_eq(prompt, &requests[i - 1].prompt);
        options.max_new_tokens - 1 + if twin { 1 } else { prompt.len() }
    };
    (0..requests.len()).map(rows).sum()
}

/// The rows of the next pass: a new token for each sequence under way, and prompts up to a limit.
fn rows(active: &[Active]) -> Vec<(usize, Row)> {
    let mut rows = Vec::new();
    let mut prefill = 0;
    for (which, a) in active.iter().enumerate() {
        let prompt = &a.request.prompt;
        let row = |position: usize, token: u32, wants_logits: bool| {
            (which, Row { slot: a.slot, position, token, wants_logits })
        };
        match a.tokens.last() {
            Some(&last) => rows.push(row(prompt.len() + a.tokens.len() - 1, last, true)),
            None => {
                // At least one row each, or a sequence could wait for ever.
                let end = prompt.len().min(a.cached + (PREFILL_ROWS.saturating_sub(prefill)).max(1));
                for position in a.cached..end {
                    rows.push(row(position, prompt[position], position + 1 == prompt.len()));
                }
                prefill += end - a.cached;
            }
        }
    }
    rows
}

impl Active {
    fn draw(&mut self, logits: &[f32], options: &Options) {
        let temperature = options.sampling.logprob_temperature() as f32;
        let lse = log_sum_exp(logits, 1.0 / temperature);
        let u = self.stream.uniform(self.tokens.len() as u64);
        let banned = if self.tokens.len() < options.min_new_tokens { &options.eos[..] } else { &[] };
        let token = options.sampling.draw(logits, banned, u, &mut self.scratch);
        self.tokens.push(token);
        self.logprobs.push(logprob(logits, token, temperature, lse));
        self.lse.push(lse);
    }

    fn finish(&self, options: &Options, text: Option<&Text>) -> Result<Option<Finish>> {
        ended(&self.tokens, options, text)
    }
}

/// Whether a completion ends with the last of these tokens, and why.
fn ended(tokens: &[u32], options: &Options, text: Option<&Text>) -> Result<Option<Finish>> {
    let Some(last) = tokens.last() else { return Ok(None) };
    if options.eos.contains(last) {
        return Ok(Some(Finish::Eos));
    }
    if let (Some(text), false) = (text, options.stop.is_empty()) {
        let said = text.decode(tokens)?;
        if options.stop.iter().any(|stop| said.contains(stop)) {
            return Ok(Some(Finish::Stop));
        }
    }
    Ok((tokens.len() >= options.max_new_tokens).then_some(Finish::Length))
}

impl Active {
    /// Where a sequence ends first, if it does: its length there, and why.
    fn first_end(&self, options: &Options, text: Option<&Text>) -> Result<Option<(usize, Finish)>> {
        if options.stop.is_empty() {
            return Ok(self.finish(options, text)?.map(|finish| (self.tokens.len(), finish)));
        }
        // A stop text may have come anywhere since the host looked last.
        for length in 1..=self.tokens.len() {
            if let Some(finish) = ended(&self.tokens[..length], options, text)? {
                return Ok(Some((length, finish)));
            }
        }
        Ok(None)
    }
}

/// A completion up to its first end-of-sequence token, which belongs to it.
pub fn until_eos<'a>(tokens: &'a [u32], eos: &[u32]) -> &'a [u32] {
    let end = tokens.iter().position(|t| eos.contains(t)).map_or(tokens.len(), |at| at + 1);
    &tokens[..end]
}

/// The text of a completion: without special tokens, and cut before the first stop text.
pub fn completion_text(text: &Text, tokens: &[u32], stop: &[String]) -> Result<String> {
    let mut said = text.decode(tokens)?;
    if let Some(at) = stop.iter().filter_map(|s| said.find(s)).min() {
        said.truncate(at);
    }
    Ok(said)
}

#[cfg(test)]
mod tests;
