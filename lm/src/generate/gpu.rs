//! Generation on a GPU: a recorded step samples a token for every sequence, and the host checks every [`STEPS`] steps.
//!
//! A prompt is prefilled into its slot of the KV cache at once, all but its last token, which the first step reads.
//! What a step reads and writes (tokens, positions, active flags, sampled tokens) stays on the device.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::Arc;

use rehearsal_kernels::attention::{Family, Heads};
use rehearsal_kernels::gpu::{Buffer, DECODE, Fields, KernelArgument, LaunchGraph, Layout, SAMPLE};

use super::{Active, Call, Completion, Options, Request};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Numbers, int, shape};
use crate::model::Decoder;
use crate::pass::{Buffers, Norm, Ops, PreparedBlock, Rows, norm};

/// Steps, of a token per sequence, between two checks by the host.
const STEPS: usize = 16;

/// Most prompt tokens in one prefill pass; a longer prompt has a pass of its own.
const PREFILL_TOKENS: usize = 8192;

/// Most end-of-sequence tokens: the size of the kernel's array.
const EOS_MAX: usize = 16;

/// Threads per block of the sampling kernel and of the cache kernels, and keys per block of attention: the kernels' own
/// constants.
const SAMPLE_THREADS: u32 = 1024;
const ATTEND_THREADS: u32 = 128;
const SPAN: usize = 128;

/// A decoder's weights of one version, with a KV cache.
pub struct GpuGenerator {
    gpu: Gpu,
    weights: Weights,
    /// Buffers of prefill passes.
    buffers: Buffers<Gpu>,
    cache: Cache,
}

struct Weights {
    blocks: Vec<PreparedBlock<Gpu>>,
    norm: Norm<Numbers>,
    head: Buffer,
}

/// A recorded decoding step for a fixed number of rows, with everything it reads and writes.
struct Step {
    recorded: Box<dyn LaunchGraph>,
    state: StepState,
    _pass: Rows<Gpu>,
    _buffers: Buffers<Gpu>,
    _logits: Buffer,
    _spans: Spans,
}

/// What the blocks of decode attention leave for the last of a row and key head, which merges it.
struct Spans {
    /// Blocks of a row and key head at most.
    count: usize,
    /// Sums of each block, `[rows][query heads][count][dim + 2]`.
    parts: Buffer,
    /// Blocks that are done, `[rows][key heads]`; zeros before and after a step.
    arrived: Buffer,
}

impl Spans {
    fn new(gpu: &Gpu, rows: usize, capacity: usize, heads: &Heads) -> Result<Self> {
        let count = capacity.div_ceil(SPAN);
        let mut parts = gpu.wide();
        gpu.room(&mut parts, rows * heads.queries * count * (heads.dim + 2))?;
        Ok(Self { count, parts, arrived: gpu.launcher.upload(&vec![0; rows * heads.keys])? })
    }
}

/// KV cache: keys and values of each layer, `[slots][key heads][capacity][dim]`.
struct Cache {
    layers: Vec<(Buffer, Buffer)>,
    slots: usize,
    capacity: usize,
}

/// Device state of a decoding step, one entry per row. Sampled tokens and log-probabilities are `[steps][rows]`.
struct StepState {
    rows: usize,
    slots: Buffer,
    ids: Buffer,
    tokens: Buffer,
    positions: Buffer,
    sampled: Buffer,
    active: Buffer,
    step: Buffer,
    sampled_tokens: Buffer,
    sampled_logprobs: Buffer,
}

/// Slots and positions of the rows of a pass in the KV cache; rows that are not `active` are skipped.
struct CacheRows<'a> {
    slots: &'a Buffer,
    positions: &'a Buffer,
    active: Option<&'a Buffer>,
}

impl GpuGenerator {
    /// Prepares a decoder's current weights.
    pub fn new(gpu: Gpu, decoder: &Decoder) -> Result<Self> {
        let layers = decoder.layers();
        let blocks = layers.blocks.iter().map(|b| PreparedBlock::new(&gpu, b)).collect::<candle_core::Result<_>>()?;
        let weights = Weights { blocks, norm: norm(&gpu, &layers.norm)?, head: gpu.head(&layers.head)? };
        Ok(Self {
            weights,
            buffers: Buffers::new(&gpu),
            cache: Cache { layers: Vec::new(), slots: 0, capacity: 0 },
            gpu,
        })
    }

    /// Generates checked requests; see [`super::Generator::generate`].
    pub fn generate(
        &mut self,
        decoder: &Decoder,
        Call { requests, options, text, cancelled, finished }: Call<'_>,
    ) -> Result<()> {
        if options.eos.len() > EOS_MAX {
            let message = format!(
                "{} end-of-sequence tokens are given, and generation on a GPU supports {EOS_MAX}; remove some",
                options.eos.len()
            );
            return Err(Error::Sampling(message));
        }
        let (slots, longest) = super::cache_shape(&requests, options);
        self.reserve(decoder, slots, longest)?;

        let mut queue: VecDeque<Request> = requests.into();
        let mut free: Vec<usize> = (0..slots).rev().collect();
        let mut active: Vec<Active> = Vec::new();
        // Prompt in the cache of each slot, also after its sequence has ended.
        let mut cached_prompts: Vec<Option<Arc<Vec<u32>>>> = vec![None; slots];
        let mut steps: BTreeMap<usize, Step> = BTreeMap::new();
        while !(queue.is_empty() && active.is_empty()) {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let admitted = free.len().min(queue.len());
            let admitted: Vec<(usize, Request)> =
                free.split_off(free.len() - admitted).into_iter().zip(queue.drain(..admitted)).collect();
            self.admit(decoder, admitted.iter().map(|(slot, request)| (*slot, &request.prompt)), &mut cached_prompts)?;
            for (slot, request) in admitted {
                let cached = request.prompt.len() - 1;
                active.push(Active::new(request, slot, cached, options.seed));
            }
            let rows = active.len().next_power_of_two().min(slots);
            let step = match steps.entry(rows) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.record(decoder, rows, options)?),
            };
            step.state.upload(&self.gpu, &active)?;
            let step_count = STEPS.min(options.max_new_tokens);
            for _ in 0..step_count {
                step.recorded.replay()?;
            }
            step.state.download(&self.gpu, &mut active, step_count, options)?;
            let mut running = Vec::with_capacity(active.len());
            for mut a in active {
                match a.first_end(options, text)? {
                    Some((length, finish)) => {
                        a.tokens.truncate(length);
                        a.logprobs.truncate(length);
                        free.push(a.slot);
                        finished(Completion { id: a.request.id, tokens: a.tokens, logprobs: a.logprobs, finish });
                    }
                    None => running.push(a),
                }
            }
            active = running;
        }
        Ok(())
    }

    fn reserve(&mut self, decoder: &Decoder, slots: usize, len: usize) -> Result<()> {
        if self.cache.slots >= slots && self.cache.capacity >= len {
            return Ok(());
        }
        let arch = decoder.architecture();
        let capacity = len.next_multiple_of(64);
        self.cache = Cache { layers: Vec::new(), slots, capacity };
        let n = slots * capacity * arch.attention(0).key_width();
        for _ in 0..arch.layers {
            let (mut keys, mut values) = (self.gpu.narrow(), self.gpu.narrow());
            self.gpu.room(&mut keys, n)?;
            self.gpu.room(&mut values, n)?;
            self.cache.layers.push((keys, values));
        }
        Ok(())
    }

    /// Fills slots with the keys and values of prompts, all but their last tokens: copied from a slot that holds the
    /// same prompt, else by prefill.
    fn admit<'a>(
        &mut self,
        decoder: &Decoder,
        admitted: impl Iterator<Item = (usize, &'a Arc<Vec<u32>>)>,
        cached_prompts: &mut [Option<Arc<Vec<u32>>>],
    ) -> Result<()> {
        let mut fresh: Vec<(usize, &[u32])> = Vec::new();
        let mut copies: Vec<(usize, usize, usize)> = Vec::new();
        for (slot, prompt) in admitted {
            let n = prompt.len() - 1;
            let holder = cached_prompts.iter().position(|p| p.as_ref().is_some_and(|p| Arc::ptr_eq(p, prompt)));
            cached_prompts[slot] = Some(prompt.clone());
            let pending = |from| fresh.iter().any(|f| f.0 == from) || copies.iter().any(|t| t.1 == from);
            match holder {
                _ if n == 0 => {}
                Some(from) if from == slot => {}
                // A prompt admitted in this call must be prefilled before it can be copied. One cached by an earlier
                // call is copied at once, because its slot may be assigned to the next prompt.
                Some(from) if pending(from) => copies.push((from, slot, n)),
                Some(from) => self.copy_prefix(decoder, from, slot, n)?,
                None => fresh.push((slot, &prompt[..n])),
            }
        }
        let mut rest = &fresh[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest.iter().take_while(|(_, prompt)| {
                tokens += prompt.len();
                tokens <= PREFILL_TOKENS
            });
            let (now, later) = rest.split_at(fitting.count().max(1));
            self.prefill(decoder, now)?;
            rest = later;
        }
        copies.into_iter().try_for_each(|(from, to, n)| self.copy_prefix(decoder, from, to, n))
    }

    /// Copies the keys and values of the first `n` tokens of a slot to another.
    fn copy_prefix(&self, decoder: &Decoder, from: usize, to: usize, n: usize) -> Result<()> {
        let heads = decoder.architecture().attention(0);
        for cache in self.cache.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let (from, to, keys) = (from as u32, to as u32, int(heads.keys));
            let arguments: [&dyn KernelArgument; 6] = [cache, &keys, &int(self.cache.capacity), &from, &to, &int(n)];
            self.gpu.launcher.rows(&DECODE, "copy_prefix", heads.keys, 256, &arguments)?;
        }
        Ok(())
    }

    /// Runs prompts through the model, as training does, and stores their keys and values in their slots.
    fn prefill(&mut self, decoder: &Decoder, prompts: &[(usize, &[u32])]) -> Result<()> {
        let (mut ids, mut slots, mut positions, mut families) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(slot, prompt) in prompts {
            families.push(Family::alone(ids.len()..ids.len() + prompt.len()));
            ids.extend_from_slice(prompt);
            slots.resize(ids.len(), slot as u32);
            positions.extend(0..prompt.len() as u32);
        }
        let rows = Rows::new(&self.gpu, decoder, &positions, &Arc::new(families))?;
        let up = |x: &[u32]| self.gpu.launcher.upload(x);
        let (ids, slots, positions) = (up(&ids)?, up(&slots)?, up(&positions)?);
        let cache_rows = CacheRows { slots: &slots, positions: &positions, active: None };
        let (cache, gpu) = (&self.cache, &self.gpu);
        self.weights.pass(gpu, decoder, &rows, &ids, cache_rows.positions, &mut self.buffers, |layer, qkv, out, lse| {
            cache.append(gpu, layer, rows.heads(layer), &cache_rows, qkv)?;
            gpu.attention(qkv, &rows.layout, rows.heads(layer), out, lse)
        })
    }

    /// Records a decoding step for `rows` rows.
    fn record(&self, decoder: &Decoder, rows: usize, options: &Options) -> Result<Step> {
        let state = StepState::new(&self.gpu, rows, STEPS)?;
        let layout = Layout::at(self.gpu.launcher.upload(&vec![0; rows])?, &self.gpu.launcher)?;
        let pass = Rows::with_layout(&self.gpu, decoder, layout, rows)?;
        let settings = settings(decoder, options);
        let (mut buffers, mut logits) = (Buffers::new(&self.gpu), self.gpu.wide());
        let spans = Spans::new(&self.gpu, rows, self.cache.capacity, &decoder.architecture().attention(0))?;
        let mut step = || self.step(decoder, &pass, &state, &settings, &spans, &mut buffers, &mut logits);
        // Run once unrecorded, with no active row: it compiles the kernels and allocates the buffers, which a recording
        // must not do.
        step()?;
        let mut failed = None;
        let recorded = self.gpu.launcher.backend.capture(&mut || {
            step().map_err(|e| {
                let message = e.to_string();
                failed = Some(e);
                candle_core::Error::Msg(message)
            })
        });
        match (failed, recorded) {
            (Some(error), _) => Err(error),
            (None, recorded) => {
                Ok(Step { recorded: recorded?, state, _pass: pass, _buffers: buffers, _logits: logits, _spans: spans })
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn step(
        &self,
        decoder: &Decoder,
        pass: &Rows<Gpu>,
        state: &StepState,
        settings: &Fields,
        spans: &Spans,
        b: &mut Buffers<Gpu>,
        logits: &mut Buffer,
    ) -> Result<()> {
        let gpu = &self.gpu;
        // RoPE reads the positions of the layout.
        gpu.overwrite(&state.positions, &pass.layout.positions)?;
        let cache_rows = CacheRows { slots: &state.slots, positions: &state.positions, active: Some(&state.active) };
        self.weights.pass(gpu, decoder, pass, &state.tokens, cache_rows.positions, b, |layer, qkv, out, _| {
            self.cache.append(gpu, layer, pass.heads(layer), &cache_rows, qkv)?;
            self.cache.attend(gpu, layer, pass.heads(layer), &cache_rows, spans, qkv, out)
        })?;
        gpu.norm(&b.x, &self.weights.norm, &mut b.normed)?;
        let arch = decoder.architecture();
        gpu.logits_into(&b.normed, &self.weights.head, (arch.vocab, arch.hidden), logits)?;
        let arguments: [&dyn KernelArgument; 10] = [
            &*logits,
            settings,
            &state.ids,
            &state.tokens,
            &state.positions,
            &state.sampled,
            &state.active,
            &state.step,
            &state.sampled_tokens,
            &state.sampled_logprobs,
        ];
        gpu.launcher.rows(&SAMPLE, "sample", state.rows, SAMPLE_THREADS, &arguments)?;
        Ok(gpu.launcher.rows(&SAMPLE, "next_step", 1, 1, &[&state.step])?)
    }
}

impl Weights {
    /// Runs rows through all blocks; `attend` computes a layer's attention from its queries, keys and values.
    #[allow(clippy::too_many_arguments)]
    fn pass(
        &self,
        gpu: &Gpu,
        decoder: &Decoder,
        rows: &Rows<Gpu>,
        ids: &Buffer,
        positions: &Buffer,
        b: &mut Buffers<Gpu>,
        attend: impl Fn(usize, &Buffer, &mut Buffer, &mut Buffer) -> candle_core::Result<()>,
    ) -> Result<()> {
        gpu.embed_rows(decoder.layers(), decoder.embedding_scale(), ids, positions, &mut b.x)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            block.forward(gpu, rows, layer, b, None, |qkv, out, lse| attend(layer, qkv, out, lse))?;
        }
        Ok(())
    }
}

impl Cache {
    /// Stores the rows' keys and values in the cache.
    fn append(
        &self,
        gpu: &Gpu,
        layer: usize,
        heads: &Heads,
        cache_rows: &CacheRows<'_>,
        qkv: &Buffer,
    ) -> candle_core::Result<()> {
        self.with_arguments(layer, heads, cache_rows, qkv, |arguments| {
            gpu.launcher.rows(&DECODE, "append", qkv.len() / heads.width(), ATTEND_THREADS, arguments)
        })
    }

    /// Computes the attention of rows, one per sequence, over the cache, which already has their own keys and values.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        gpu: &Gpu,
        layer: usize,
        heads: &Heads,
        cache_rows: &CacheRows<'_>,
        spans: &Spans,
        qkv: &Buffer,
        out: &mut Buffer,
    ) -> candle_core::Result<()> {
        let rows = qkv.len() / heads.width();
        gpu.room(out, rows * heads.query_width())?;
        let (grid, count) = ((rows * spans.count, heads.keys), int(spans.count));
        self.with_arguments(layer, heads, cache_rows, qkv, |arguments| {
            let arguments = [arguments, &[&count, &spans.parts, &spans.arrived, &*out]].concat();
            gpu.launcher.run(&DECODE, "attend", grid, (ATTEND_THREADS, 1), 0, &arguments)
        })
    }

    /// Calls `launch` with the arguments that the cache kernels share.
    fn with_arguments<T>(
        &self,
        layer: usize,
        heads: &Heads,
        cache_rows: &CacheRows<'_>,
        qkv: &Buffer,
        launch: impl FnOnce(&[&dyn KernelArgument]) -> T,
    ) -> T {
        let (keys, values) = &self.layers[layer];
        let (shape, capacity) = (shape(heads), int(self.capacity));
        let active = cache_rows.active.map_or(0, Buffer::pointer);
        launch(&[qkv, cache_rows.slots, cache_rows.positions, &active, &shape, &capacity, keys, values])
    }
}

/// The sampling kernel's `Settings` structure.
fn settings(decoder: &Decoder, options: &Options) -> Fields {
    let (arch, s) = (decoder.architecture(), &options.sampling);
    let mut fields = Fields::new()
        .wide(options.seed)
        .float(s.temperature as f32)
        .float(s.top_p as f32)
        .float(s.min_p as f32)
        .float(arch.final_softcap.unwrap_or(0.0) as f32)
        .int(s.top_k)
        .int(arch.vocab)
        .int(options.min_new_tokens)
        .int(options.eos.len())
        .int(options.max_new_tokens);
    for i in 0..EOS_MAX {
        fields = fields.int(options.eos.get(i).copied().unwrap_or(0) as usize);
    }
    // Padding: the structure's size is a multiple of eight bytes.
    fields.int(0)
}

impl StepState {
    fn new(gpu: &Gpu, rows: usize, steps: usize) -> Result<Self> {
        let zeros = |n: usize| gpu.launcher.upload(&vec![0; n]);
        Ok(Self {
            rows,
            slots: zeros(rows)?,
            ids: zeros(2 * rows)?,
            tokens: zeros(rows)?,
            positions: zeros(rows)?,
            sampled: zeros(rows)?,
            active: zeros(rows)?,
            step: zeros(1)?,
            sampled_tokens: zeros(rows * steps)?,
            sampled_logprobs: zeros(rows * steps)?,
        })
    }

    /// Writes the state of the sequences to the device; unused rows are inactive.
    fn upload(&self, gpu: &Gpu, active: &[Active]) -> Result<()> {
        let column = |f: &dyn Fn(&Active) -> u32| {
            let mut all: Vec<u32> = active.iter().map(f).collect();
            all.resize(self.rows, 0);
            all
        };
        let place = |a: &Active| a.request.prompt.len() + a.tokens.len() - 1;
        let token = |a: &Active| a.tokens.last().or(a.request.prompt.last()).copied().unwrap_or_default();
        let ids: Vec<u32> = active.iter().flat_map(|a| [a.request.id as u32, (a.request.id >> 32) as u32]).collect();
        for (values, buffer) in [
            (column(&|a| a.slot as u32), &self.slots),
            (ids, &self.ids),
            (column(&token), &self.tokens),
            (column(&|a| place(a) as u32), &self.positions),
            (column(&|a| a.tokens.len() as u32), &self.sampled),
            (column(&|_| 1), &self.active),
            (vec![0], &self.step),
        ] {
            if !values.is_empty() {
                gpu.launcher.backend.upload(bytemuck::cast_slice(&values), buffer.pointer())?;
            }
        }
        Ok(())
    }

    /// Appends the tokens sampled in `steps` steps to their sequences, up to the end of each.
    fn download(&self, gpu: &Gpu, active: &mut [Active], steps: usize, options: &Options) -> Result<()> {
        let (mut tokens, mut logprobs) = (vec![0u32; self.rows * steps], vec![0.0f32; self.rows * steps]);
        let backend = &gpu.launcher.backend;
        backend.download(self.sampled_tokens.pointer(), bytemuck::cast_slice_mut(&mut tokens))?;
        backend.download(self.sampled_logprobs.pointer(), bytemuck::cast_slice_mut(&mut logprobs))?;
        for (row, a) in active.iter_mut().enumerate() {
            for step in 0..steps {
                let ended = a.tokens.last().is_some_and(|t| options.eos.contains(t));
                if ended || a.tokens.len() >= options.max_new_tokens {
                    break;
                }
                a.tokens.push(tokens[step * self.rows + row]);
                a.logprobs.push(logprobs[step * self.rows + row]);
            }
        }
        Ok(())
    }
}
