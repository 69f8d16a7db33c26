//! Generation on a GPU: a recorded step draws a token for every sequence, and the host looks only every few tokens.
//!
//! A prompt goes into its slot of the cache at once, all but its last token, which is the first step's. What a step reads
//! and writes (tokens, positions, who goes on, what was drawn) stays on the device.

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

/// Tokens between two looks of the host.
const STEPS: usize = 16;

/// Tokens of prompts that go through the model in one pass, unless one prompt has more.
const PREFILL_TOKENS: usize = 8192;

/// Tokens that may end a completion, as the kernel has room for them.
const ENDS_MAX: usize = 16;

/// Threads of a draw, and of attention against the cache, as the kernels have them.
const SAMPLE_THREADS: u32 = 1024;
const ATTEND_THREADS: u32 = 128;
const SPAN: usize = 128;

/// A decoder's weights of one version, with a cache.
pub struct GpuGenerator {
    gpu: Gpu,
    weights: Weights,
    /// For prompts.
    buffers: Buffers<Gpu>,
    cache: Cache,
}

struct Weights {
    blocks: Vec<PreparedBlock<Gpu>>,
    norm: Norm<Numbers>,
    head: Buffer,
}

/// A recorded step for some rows, with everything it reads and writes.
struct Step {
    recorded: Box<dyn LaunchGraph>,
    state: State,
    _pass: Rows<Gpu>,
    _buffers: Buffers<Gpu>,
    _logits: Buffer,
}

/// Keys and values: for each layer `[slots][key heads][capacity][dim]`.
struct Cache {
    layers: Vec<(Buffer, Buffer)>,
    slots: usize,
    capacity: usize,
}

/// What a step reads and writes, for some rows.
struct State {
    rows: usize,
    slots: Buffer,
    ids: Buffer,
    tokens: Buffer,
    positions: Buffer,
    drawn: Buffer,
    active: Buffer,
    step: Buffer,
    drawn_tokens: Buffer,
    drawn_logprobs: Buffer,
}

/// Which rows a pass of the cache has.
struct Places<'a> {
    slots: &'a Buffer,
    positions: &'a Buffer,
    active: Option<&'a Buffer>,
}

impl GpuGenerator {
    /// Prepares a decoder's weights as they are now.
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
        if options.eos.len() > ENDS_MAX {
            let message = format!("{} tokens end a completion; on a GPU {ENDS_MAX} may", options.eos.len());
            return Err(Error::Sampling(message));
        }
        let (slots, longest) = super::room(&requests, options);
        self.reserve(decoder, slots, longest)?;

        let mut waiting: VecDeque<Request> = requests.into();
        let mut free: Vec<usize> = (0..slots).rev().collect();
        let mut active: Vec<Active> = Vec::new();
        // Prompts that slots hold, also of sequences that have ended.
        let mut held: Vec<Option<Arc<Vec<u32>>>> = vec![None; slots];
        let mut steps: BTreeMap<usize, Step> = BTreeMap::new();
        while !(waiting.is_empty() && active.is_empty()) {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let come = free.len().min(waiting.len());
            let come: Vec<(usize, Request)> =
                free.split_off(free.len() - come).into_iter().zip(waiting.drain(..come)).collect();
            self.admit(decoder, come.iter().map(|(slot, request)| (*slot, &request.prompt)), &mut held)?;
            for (slot, request) in come {
                let cached = request.prompt.len() - 1;
                active.push(Active::new(request, slot, cached, options.seed));
            }
            let rows = active.len().next_power_of_two().min(slots);
            let step = match steps.entry(rows) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.record(decoder, rows, options)?),
            };
            step.state.upload(&self.gpu, &active)?;
            let looks = STEPS.min(options.max_new_tokens);
            for _ in 0..looks {
                step.recorded.replay()?;
            }
            step.state.download(&self.gpu, &mut active, looks, options)?;
            let mut going = Vec::with_capacity(active.len());
            for mut a in active {
                match a.first_end(options, text)? {
                    Some((length, finish)) => {
                        a.tokens.truncate(length);
                        a.logprobs.truncate(length);
                        free.push(a.slot);
                        finished(Completion { id: a.request.id, tokens: a.tokens, logprobs: a.logprobs, finish });
                    }
                    None => going.push(a),
                }
            }
            active = going;
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

    /// Puts prompts, all but their last tokens, into slots: from others that hold them, or through the model, together.
    fn admit<'a>(
        &mut self,
        decoder: &Decoder,
        come: impl Iterator<Item = (usize, &'a Arc<Vec<u32>>)>,
        held: &mut [Option<Arc<Vec<u32>>>],
    ) -> Result<()> {
        let mut fresh: Vec<(usize, &[u32])> = Vec::new();
        let mut twins: Vec<(usize, usize, usize)> = Vec::new();
        for (slot, prompt) in come {
            let n = prompt.len() - 1;
            let twin = held.iter().position(|p| p.as_ref().is_some_and(|p| Arc::ptr_eq(p, prompt)));
            held[slot] = Some(prompt.clone());
            let coming = |from| fresh.iter().any(|f| f.0 == from) || twins.iter().any(|t| t.1 == from);
            match twin {
                _ if n == 0 => {}
                Some(from) if from == slot => {}
                // One that comes now, too, has to go through the model first. What another has left behind is copied at
                // once: its slot may be given to the next.
                Some(from) if coming(from) => twins.push((from, slot, n)),
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
        twins.into_iter().try_for_each(|(from, to, n)| self.copy_prefix(decoder, from, to, n))
    }

    /// Copies the first `n` tokens of a slot to another.
    fn copy_prefix(&self, decoder: &Decoder, from: usize, to: usize, n: usize) -> Result<()> {
        let heads = decoder.architecture().attention(0);
        for cache in self.cache.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let (from, to, keys) = (from as u32, to as u32, int(heads.keys));
            let arguments: [&dyn KernelArgument; 6] = [cache, &keys, &int(self.cache.capacity), &from, &to, &int(n)];
            self.gpu.launcher.rows(&DECODE, "copy_prefix", heads.keys, 256, &arguments)?;
        }
        Ok(())
    }

    /// Carries prompts through the model, as training does, and leaves their keys and values in their slots.
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
        let places = Places { slots: &slots, positions: &positions, active: None };
        let (cache, gpu) = (&self.cache, &self.gpu);
        self.weights.pass(gpu, decoder, &rows, &ids, places.positions, &mut self.buffers, |layer, qkv, out, lse| {
            cache.append(gpu, layer, rows.heads(layer), &places, qkv)?;
            gpu.attention(qkv, &rows.layout, rows.heads(layer), out, lse)
        })
    }

    /// One step for so many rows, recorded.
    fn record(&self, decoder: &Decoder, rows: usize, options: &Options) -> Result<Step> {
        let state = State::new(&self.gpu, rows, STEPS)?;
        let layout = Layout::at(self.gpu.launcher.upload(&vec![0; rows])?, &self.gpu.launcher)?;
        let pass = Rows::with_layout(&self.gpu, decoder, layout, rows)?;
        let settings = settings(decoder, options);
        let (mut buffers, mut logits) = (Buffers::new(&self.gpu), self.gpu.wide());
        let mut step = || self.step(decoder, &pass, &state, &settings, &mut buffers, &mut logits);
        // Once as it is, with nobody drawing, so that everything is compiled and has its room.
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
                Ok(Step { recorded: recorded?, state, _pass: pass, _buffers: buffers, _logits: logits })
            }
        }
    }

    fn step(
        &self,
        decoder: &Decoder,
        pass: &Rows<Gpu>,
        state: &State,
        settings: &Fields,
        b: &mut Buffers<Gpu>,
        logits: &mut Buffer,
    ) -> Result<()> {
        let gpu = &self.gpu;
        // The rotation reads where the rows stand now.
        gpu.overwrite(&state.positions, &pass.layout.positions)?;
        let places = Places { slots: &state.slots, positions: &state.positions, active: Some(&state.active) };
        self.weights.pass(gpu, decoder, pass, &state.tokens, places.positions, b, |layer, qkv, out, _| {
            self.cache.append(gpu, layer, pass.heads(layer), &places, qkv)?;
            self.cache.attend(gpu, layer, pass.heads(layer), &places, qkv, out)
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
            &state.drawn,
            &state.active,
            &state.step,
            &state.drawn_tokens,
            &state.drawn_logprobs,
        ];
        gpu.launcher.rows(&SAMPLE, "sample", state.rows, SAMPLE_THREADS, &arguments)?;
        Ok(gpu.launcher.rows(&SAMPLE, "next_step", 1, 1, &[&state.step])?)
    }
}

impl Weights {
    /// Carries rows through all blocks; `attend` fills a layer's attention from its queries, keys and values.
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
    /// Puts the rows' keys and values into the cache.
    fn append(
        &self,
        gpu: &Gpu,
        layer: usize,
        heads: &Heads,
        places: &Places<'_>,
        qkv: &Buffer,
    ) -> candle_core::Result<()> {
        self.with_arguments(layer, heads, places, qkv, |arguments| {
            gpu.launcher.rows(&DECODE, "append", qkv.len() / heads.width(), ATTEND_THREADS, arguments)
        })
    }

    /// Fills the attention's output of rows, one a sequence, from the cache that has their keys and values.
    fn attend(
        &self,
        gpu: &Gpu,
        layer: usize,
        heads: &Heads,
        places: &Places<'_>,
        qkv: &Buffer,
        out: &mut Buffer,
    ) -> candle_core::Result<()> {
        let rows = qkv.len() / heads.width();
        gpu.room(out, rows * heads.query_width())?;
        let shared = 4 * heads.group() * (2 * heads.dim + SPAN + 3);
        self.with_arguments(layer, heads, places, qkv, |arguments| {
            let arguments = [arguments, &[&*out]].concat();
            gpu.launcher.run(&DECODE, "attend", (rows, heads.keys), (ATTEND_THREADS, 1), shared, &arguments)
        })
    }

    /// What the kernels of the cache are given.
    fn with_arguments<T>(
        &self,
        layer: usize,
        heads: &Heads,
        places: &Places<'_>,
        qkv: &Buffer,
        launch: impl FnOnce(&[&dyn KernelArgument]) -> T,
    ) -> T {
        let (keys, values) = &self.layers[layer];
        let (shape, capacity) = (shape(heads), int(self.capacity));
        let active = places.active.map_or(0, Buffer::pointer);
        launch(&[qkv, places.slots, places.positions, &active, &shape, &capacity, keys, values])
    }
}

/// `Settings` of the kernel.
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
    for i in 0..ENDS_MAX {
        fields = fields.int(options.eos.get(i).copied().unwrap_or(0) as usize);
    }
    // The structure's size is a multiple of eight.
    fields.int(0)
}

impl State {
    fn new(gpu: &Gpu, rows: usize, steps: usize) -> Result<Self> {
        let zeros = |n: usize| gpu.launcher.upload(&vec![0; n]);
        Ok(Self {
            rows,
            slots: zeros(rows)?,
            ids: zeros(2 * rows)?,
            tokens: zeros(rows)?,
            positions: zeros(rows)?,
            drawn: zeros(rows)?,
            active: zeros(rows)?,
            step: zeros(1)?,
            drawn_tokens: zeros(rows * steps)?,
            drawn_logprobs: zeros(rows * steps)?,
        })
    }

    /// Where the sequences stand.
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
            (column(&|a| a.tokens.len() as u32), &self.drawn),
            (column(&|_| 1), &self.active),
            (vec![0], &self.step),
        ] {
            if !values.is_empty() {
                gpu.launcher.backend.upload(bytemuck::cast_slice(&values), buffer.pointer())?;
            }
        }
        Ok(())
    }

    /// Takes over what was drawn in so many steps, up to the ends.
    fn download(&self, gpu: &Gpu, active: &mut [Active], steps: usize, options: &Options) -> Result<()> {
        let (mut tokens, mut logprobs) = (vec![0u32; self.rows * steps], vec![0.0f32; self.rows * steps]);
        let backend = &gpu.launcher.backend;
        backend.download(self.drawn_tokens.pointer(), bytemuck::cast_slice_mut(&mut tokens))?;
        backend.download(self.drawn_logprobs.pointer(), bytemuck::cast_slice_mut(&mut logprobs))?;
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
