//! Generation with continuous batching: when a sequence finishes, the next request takes its slot of the KV cache.
//!
//! A completion depends only on (weights, prompt, seed, rollout id, settings), not on batch size, the order of
//! requests, the thread count or the other sequences of a batch: kernels are batch-invariant ([`rehearsal_kernels`]), and
//! random numbers are addressed by rollout and position ([`rehearsal_kernels::random`]).

mod cache;
mod cpu;
mod gpu;
mod plain;
mod sampling;

pub use sampling::{Sampling, Scratch};

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use rehearsal_kernels::head::logprob;
use rehearsal_kernels::math::{LogSum, log_sum_exp};
use rehearsal_kernels::random::Stream;
use rehearsal_kernels::team::{for_each_chunk, with_team};
use serde::{Deserialize, Serialize};

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
    /// Rollout id; selects the random numbers, so it is unique in a run.
    pub id: u64,
    /// Prompt tokens, at least one. Requests with the same `Arc`, side by side in a call, share the prefix cache.
    pub prompt: Arc<Vec<u32>>,
}

/// Settings shared by the requests of a call.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// How tokens are sampled.
    pub sampling: Sampling,
    /// Most tokens of a completion; 1 or more.
    pub max_new_tokens: usize,
    /// Fewest tokens of a completion before an end-of-sequence token may be sampled.
    pub min_new_tokens: usize,
    /// End-of-sequence tokens; the one that ends a completion is part of it.
    pub eos: Vec<u32>,
    /// Stop strings: text that ends a completion. Its tokens include them, [`completion_text`] does not.
    pub stop: Vec<String>,
    /// Seed of the run.
    pub seed: u64,
    /// Most sequences in flight.
    pub batch: usize,
}

/// Finish reason of a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// An end-of-sequence token was sampled.
    #[default]
    Eos,
    /// The text contains a stop string.
    Stop,
    /// `max_new_tokens` was reached.
    Length,
}

/// A finished completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Id of the request.
    pub id: u64,
    /// Token ids, with the end-of-sequence token if one was sampled.
    pub tokens: Vec<u32>,
    /// Log-probability of each token at [`Sampling::logprob_temperature`], before top-k, top-p and min-p.
    pub logprobs: Vec<f32>,
    /// Why the completion ended.
    pub finish: Finish,
}

/// Most prompt tokens in one forward pass, so that prefill of a long prompt does not delay the other sequences.
const PREFILL_ROWS: usize = 512;

enum Backend {
    Packed(Box<PackedBackend>),
    Plain { cache: plain::PlainCache },
    Gpu(Box<GpuGenerator>),
}

/// Packed weights of one version, with the KV cache and the buffers that passes reuse.
struct PackedBackend {
    weights: PackedWeights,
    room: Room,
    cache: Cache,
}

/// Generates completions with the weights that the decoder had when the generator was created.
pub struct Generator {
    decoder: Decoder,
    backend: Backend,
    /// Records the activations of the current call, if they were asked for.
    recorder: Option<Recorder>,
}

/// A sequence in flight.
struct Active {
    request: Request,
    /// Its slot of the KV cache.
    slot: usize,
    /// Tokens whose keys and values are in the KV cache.
    cached: usize,
    stream: Stream,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Log-sum-exp of the logits that each token was sampled from.
    lse: Vec<LogSum>,
    /// Its rows in the recording.
    trail: Trail,
    scratch: Scratch,
}

impl Active {
    /// A new sequence, the first `cached` tokens of whose prompt are in the KV cache.
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

    /// Generates a completion for every request and passes each to `finished` when it ends, in no fixed order.
    ///
    /// `text` is needed for stop strings only. Once `cancelled` returns true, the call fails with [`Error::Cancelled`];
    /// completions passed to `finished` before remain valid. Fails before generating anything if a setting is out of
    /// range, or if a prompt is empty, exceeds the context or has a token outside the vocabulary; and with
    /// [`Error::NotFinite`] if the model's probabilities are no numbers.
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
        let diverged = Cell::new(None);
        let cancelled = || diverged.get().is_some() || cancelled();
        let mut finished = |completion: Completion| {
            if completion.logprobs.iter().all(|logprob| logprob.is_finite()) {
                finished(completion);
            } else {
                diverged.set(Some(completion.id));
            }
        };
        let call = Call { requests, options, text, cancelled: &cancelled, finished: &mut finished };
        let result = match &mut self.backend {
            Backend::Gpu(gpu) => gpu.generate(&self.decoder, call),
            _ => with_team(|| self.generate_on_host(call)),
        };
        diverged.get().map_or(result, |id| Err(Error::NotFinite { id }))
    }

    /// [`Generator::generate`], which also records the activations of the completions for
    /// [`Decoder::forward_recalled`].
    ///
    /// Returns `None` if there were more than `tokens` rows to record, or if passes of the decoder cannot be recorded
    /// (devices other than the CPU, frozen weights, gradient checkpointing).
    pub fn generate_recorded(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        text: Option<&Text>,
        cancelled: &dyn Fn() -> bool,
        finished: &mut dyn FnMut(Completion),
        tokens: usize,
    ) -> Result<Option<Recording>> {
        if matches!(self.backend, Backend::Packed(_)) && self.decoder.can_record() {
            let temperature = options.sampling.logprob_temperature();
            self.recorder = Some(Recorder::new(&self.decoder, tokens, total_rows(&requests, options), temperature));
        }
        let result = self.generate(requests, options, text, cancelled, finished);
        let recorder = self.recorder.take();
        result.map(|()| recorder.map(Recorder::finish))
    }

    fn generate_on_host(&mut self, Call { requests, options, text, cancelled, finished }: Call<'_>) -> Result<()> {
        let mut slots = Slots::new(&requests, options);
        self.reserve(&slots.lengths);

        let mut queue: VecDeque<Request> = requests.into();
        let mut active: Vec<Active> = Vec::new();
        while !(queue.is_empty() && active.is_empty()) {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            self.admit(&mut queue, &mut slots, &mut active, options)?;
            let rows = rows(&active);
            let mut advance = vec![0; active.len()];
            for (sequence, _) in &rows {
                advance[*sequence] += 1;
            }
            let mut wants = vec![false; active.len()];
            for (sequence, row) in &rows {
                wants[*sequence] |= row.wants_logits;
            }
            let (owners, rows): (Vec<usize>, Vec<Row>) = rows.into_iter().unzip();
            let vocab = self.decoder.architecture().vocab;
            self.recorder = self.recorder.take().filter(|recorder| recorder.fits(rows.len()));
            let logits = self.forward(&rows)?;
            let mut sampled: Vec<_> =
                active.iter_mut().zip(wants).filter_map(|(a, wants)| wants.then_some(a)).collect();
            for_each_chunk(&mut sampled, 1, |i, a| a[0].draw(&logits[i * vocab..(i + 1) * vocab], options));
            drop(logits);
            if let Some(recorder) = &self.recorder {
                let mut head_rows = 0..;
                for (i, (&sequence, row)) in owners.iter().zip(&rows).enumerate() {
                    let head_row = if row.wants_logits { head_rows.next() } else { None };
                    recorder.add_row(&mut active[sequence].trail, i, head_row);
                }
            }
            for (a, rows) in active.iter_mut().zip(advance) {
                a.cached += rows;
            }
            let mut running = Vec::with_capacity(active.len());
            for a in active {
                match a.finish(options, text)? {
                    Some(finish) => {
                        slots.free.push(a.slot);
                        if let Some(recorder) = &mut self.recorder {
                            recorder.end_completion(&a.request.prompt, &a.tokens, a.trail, &a.logprobs, &a.lse);
                        }
                        finished(Completion { id: a.request.id, tokens: a.tokens, logprobs: a.logprobs, finish });
                    }
                    None => running.push(a),
                }
            }
            active = running;
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
                return Err(Error::TokenOutOfVocabulary { token, vocab: arch.vocab });
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

    /// Assigns queued requests to free slots. A request copies its prompt's keys and values from a sequence that has
    /// the same prompt; while that sequence is still in prefill, the request stays queued and later ones may overtake
    /// it.
    fn admit(
        &mut self,
        queue: &mut VecDeque<Request>,
        slots: &mut Slots,
        active: &mut Vec<Active>,
        options: &Options,
    ) -> Result<()> {
        while !slots.free.is_empty() {
            // The last prompt token is computed again for its logits: the same bits, by batch invariance.
            let shared = |prompt: &Arc<Vec<u32>>| prompt.len() - 1;
            let holder = |r: &Request| active.iter().find(|a| Arc::ptr_eq(&a.request.prompt, &r.prompt));
            let ready = |r: &Request| holder(r).is_none_or(|t| t.cached >= shared(&r.prompt));
            let Some(next) = queue.iter().position(ready) else { break };
            let Some(slot) = slots.take(length(&queue[next], options)) else { break };
            let Some(request) = queue.remove(next) else { break };
            let cached = match holder(&request).map(|t| t.slot) {
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

/// Arguments of [`Generator::generate`].
struct Call<'a> {
    requests: Vec<Request>,
    options: &'a Options,
    text: Option<&'a Text>,
    cancelled: &'a dyn Fn() -> bool,
    finished: &'a mut dyn FnMut(Completion),
}

/// Most tokens of a sequence, prompt included.
fn length(request: &Request, options: &Options) -> usize {
    request.prompt.len() + options.max_new_tokens
}

/// `(slots, tokens per slot)` of a KV cache with equal slots for these requests.
fn cache_shape(requests: &[Request], options: &Options) -> (usize, usize) {
    let longest = requests.iter().map(|r| length(r, options)).max().unwrap_or(0);
    (options.batch.clamp(1, requests.len().max(1)), longest)
}

/// Slots of the KV cache: how many tokens each holds, and which are free.
struct Slots {
    lengths: Vec<usize>,
    free: Vec<usize>,
}

impl Slots {
    /// One slot per request, of its greatest length, if all may be in flight at once; else `options.batch` slots, each
    /// of the greatest length of any request.
    fn new(requests: &[Request], options: &Options) -> Self {
        let (slots, longest) = cache_shape(requests, options);
        let lengths = match slots == requests.len() {
            true => requests.iter().map(|r| length(r, options)).collect(),
            false => vec![longest; slots],
        };
        Self { free: (0..slots).collect(), lengths }
    }

    /// Takes the smallest free slot that holds `length` tokens. Best fit leaves a slot for every request, in whatever
    /// order they are admitted.
    fn take(&mut self, length: usize) -> Option<usize> {
        let fitting = self.free.iter().enumerate().filter(|(_, slot)| self.lengths[**slot] >= length);
        let (at, _) = fitting.min_by_key(|(_, slot)| self.lengths[**slot])?;
        Some(self.free.swap_remove(at))
    }
}

/// Rows that are computed if every completion reaches `max_new_tokens`.
fn total_rows(requests: &[Request], options: &Options) -> usize {
    let rows = |i: usize| {
        let prompt = &requests[i].prompt;
        // With the prompt of the request before, all rows of the prompt but the last are copied.
        let shared = i > 0 && Arc::ptr_eq(prompt, &requests[i - 1].prompt);
        options.max_new_tokens - 1 + if shared { 1 } else { prompt.len() }
    };
    (0..requests.len()).map(rows).sum()
}

/// Rows of the next pass, each with the index of its sequence: the last token of each sequence that is being decoded,
/// and prompt tokens up to [`PREFILL_ROWS`].
fn rows(active: &[Active]) -> Vec<(usize, Row)> {
    let mut rows = Vec::new();
    let mut prefill = 0;
    for (sequence, a) in active.iter().enumerate() {
        let prompt = &a.request.prompt;
        let row = |position: usize, token: u32, wants_logits: bool| {
            (sequence, Row { slot: a.slot, position, token, wants_logits })
        };
        match a.tokens.last() {
            Some(&last) => rows.push(row(prompt.len() + a.tokens.len() - 1, last, true)),
            None => {
                // At least one row per sequence, so that none starves.
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
        finish_reason(&self.tokens, options, text)
    }
}

/// Finish reason of a completion of these tokens; `None` if it goes on.
fn finish_reason(tokens: &[u32], options: &Options, text: Option<&Text>) -> Result<Option<Finish>> {
    let Some(last) = tokens.last() else { return Ok(None) };
    if options.eos.contains(last) {
        return Ok(Some(Finish::Eos));
    }
    if let (Some(text), false) = (text, options.stop.is_empty()) {
        let decoded = text.decode(tokens)?;
        if options.stop.iter().any(|stop| decoded.contains(stop)) {
            return Ok(Some(Finish::Stop));
        }
    }
    Ok((tokens.len() >= options.max_new_tokens).then_some(Finish::Length))
}

impl Active {
    /// Length of the completion at its first end, and the finish reason; `None` if it goes on.
    fn first_end(&self, options: &Options, text: Option<&Text>) -> Result<Option<(usize, Finish)>> {
        if options.stop.is_empty() {
            return Ok(self.finish(options, text)?.map(|finish| (self.tokens.len(), finish)));
        }
        // The host checks only every few steps: a stop string may have been completed at any of them.
        for length in 1..=self.tokens.len() {
            if let Some(finish) = finish_reason(&self.tokens[..length], options, text)? {
                return Ok(Some((length, finish)));
            }
        }
        Ok(None)
    }
}

/// Tokens of a completion up to and including the first end-of-sequence token; all of them if there is none.
pub fn until_eos<'a>(tokens: &'a [u32], eos: &[u32]) -> &'a [u32] {
    let end = tokens.iter().position(|t| eos.contains(t)).map_or(tokens.len(), |at| at + 1);
    &tokens[..end]
}

/// Decodes a completion, without special tokens, and cuts it before the first stop string.
pub fn completion_text(text: &Text, tokens: &[u32], stop: &[String]) -> Result<String> {
    let mut decoded = text.decode(tokens)?;
    if let Some(at) = stop.iter().filter_map(|s| decoded.find(s)).min() {
        decoded.truncate(at);
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests;
