//! What a GPU does, and how near it comes to what the card can do: ceilings, products, decoding, training passes, the optimizer,
//! and the time of each kernel. Weights are random, of the shapes of real models.
//!
//!     cargo bench --features cuda --bench gpu              # everything, some minutes
//!     cargo bench --features cuda --bench gpu -- decode    # what matches

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rehearsal::Devices;
use rehearsal::actors::Placement;
use rehearsal::lm::generate::{Generator, Options, Request, Sampling};
use rehearsal::lm::{Architecture, Batch, Decoder, Gradients, Parameters, Precision, Sequence};
use rehearsal_kernels::gpu::{
    Buffer, DeviceMemory, ElementType, Factor, Gemm, GpuBackend, Launch, LaunchGraph, for_device,
};
use rehearsal_learn::{AdamW, AdamWConfig, MomentType, global_norm};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Shapes of models: SmolLM2-135M and Qwen2.5-1.5B.
fn config(name: &str) -> serde_json::Value {
    let (vocab, hidden, layers, heads, keys, inner) = match name {
        "135M" => (49_152, 576, 30, 9, 3, 1536),
        _ => (151_936, 1536, 28, 12, 2, 8960),
    };
    serde_json::json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": inner, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true,
    })
}

fn model(name: &str, device: &Device, precision: Precision) -> Result<Decoder> {
    let architecture = Architecture::from_json(&config(name))?;
    let mut parameters = Parameters::default();
    for (name, shape) in architecture.parameters() {
        let tensor = match shape.len() {
            1 => Tensor::ones(shape, DType::F32, device)?,
            _ => Tensor::rand(-0.035f32, 0.035, shape, device)?,
        };
        parameters.insert(name, tensor);
    }
    Ok(Decoder::trainable(architecture, parameters)?.with_precision(precision))
}

fn elements(decoder: &Decoder) -> usize {
    decoder.parameters().values().map(Tensor::elem_count).sum()
}

fn tokens(n: usize, from: usize) -> Vec<u32> {
    (from..from + n).map(|i| (i as u32).wrapping_mul(2_654_435_761) >> 17).collect()
}

/// Milliseconds of `f`, the median of `n` runs after one that is not timed.
fn time(backend: &dyn GpuBackend, n: usize, mut f: impl FnMut() -> Result) -> Result<f64> {
    f()?;
    let mut all = Vec::new();
    for _ in 0..n {
        backend.synchronize()?;
        let start = Instant::now();
        f()?;
        backend.synchronize()?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[n / 2])
}

/// What the card reached: bytes and floating-point operations per millisecond.
struct Ceilings {
    bytes: f64,
    flops: f64,
}

fn buffer(backend: &dyn GpuBackend, n: usize, element: ElementType) -> Result<Buffer> {
    let mut buffer = Buffer::empty(element);
    buffer.resize(backend, n)?;
    Ok(buffer)
}

fn ceilings(backend: &dyn GpuBackend, device: &Device) -> Result<Ceilings> {
    let bytes = 2usize << 30;
    let (from, to) = (buffer(backend, bytes / 4, ElementType::F32)?, buffer(backend, bytes / 4, ElementType::F32)?);
    let copy = time(backend, 10, || Ok(backend.copy(from.pointer(), to.pointer(), bytes)?))?;
    let n = 8192;
    let random = || Tensor::rand(-1f32, 1.0, (n, n), device)?.to_dtype(DType::BF16);
    let (a, b) = (random()?, random()?);
    let c = buffer(backend, n * n, ElementType::Bf16)?;
    let factor = |t: &Tensor, transposed| -> Result<Factor> {
        Ok(Factor { pointer: backend.tensor(t)?, stride: n, transposed })
    };
    let gemm = Gemm {
        rows: n,
        depth: n,
        columns: n,
        element: ElementType::Bf16,
        a: factor(&a, false)?,
        b: factor(&b, true)?,
        c: c.pointer(),
        c_stride: n,
        c_element: ElementType::Bf16,
        add: false,
    };
    let product = time(backend, 10, || Ok(backend.gemm(&gemm)?))?;
    let found = Ceilings { bytes: 2.0 * bytes as f64 / copy, flops: 2.0 * (n as f64).powi(3) / product };
    println!("ceilings: copy {:.2} TB/s, bf16 product {:.0} TFLOP/s", found.bytes / 1e9, found.flops / 1e9);
    Ok(found)
}

/// Each algorithm for the products of a model, by rows, and which have the bits of the first.
fn products(backend: &dyn GpuBackend, device: &Device) -> Result {
    for (name, shapes) in [
        ("135M", vec![(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49_152)]),
        ("1.5B", vec![(1536, 2048), (1536, 17_920), (8960, 1536), (1536, 151_936)]),
    ] {
        for (depth, columns) in shapes {
            for rows in [16usize, 64, 256, 1024, 8192] {
                if rows * columns > 1 << 28 {
                    continue;
                }
                let a = Tensor::rand(-1f32, 1.0, (rows, depth), device)?.to_dtype(DType::BF16)?;
                let b = Tensor::rand(-1f32, 1.0, (columns, depth), device)?.to_dtype(DType::BF16)?;
                let c = buffer(backend, rows * columns, ElementType::Bf16)?;
                let gemm = Gemm {
                    rows,
                    depth,
                    columns,
                    element: ElementType::Bf16,
                    a: Factor { pointer: backend.tensor(&a)?, stride: depth, transposed: false },
                    b: Factor { pointer: backend.tensor(&b)?, stride: depth, transposed: true },
                    c: c.pointer(),
                    c_stride: columns,
                    c_element: ElementType::Bf16,
                    add: false,
                };
                let found = backend.survey(&gemm)?;
                let chosen = time(backend, 10, || Ok((0..10).try_for_each(|_| backend.gemm(&gemm))?))? * 100.0;
                let all: Vec<String> =
                    found.iter().map(|(ms, same)| format!("{:.1}{}", ms * 1e3, if *same { "" } else { "*" })).collect();
                println!("product {name} {rows} x {depth} x {columns}: chosen {chosen:.1} us; {}", all.join(" "));
            }
        }
    }
    Ok(())
}

fn generate(generator: &mut Generator, rows: usize, prompt: usize, new: usize) -> Result {
    let requests =
        (0..rows).map(|i| Request { id: i as u64, prompt: Arc::new(tokens(prompt, 1000 * i)) }).collect::<Vec<_>>();
    let sampling = Sampling { temperature: 1.0, ..Default::default() };
    let options = Options {
        sampling,
        max_new_tokens: new,
        min_new_tokens: new,
        eos: vec![2],
        stop: Vec::new(),
        seed: 1,
        batch: rows,
    };
    generator.generate(requests, &options, None, &|| false, &mut |_| {})?;
    Ok(())
}

fn decode(name: &str, backend: &dyn GpuBackend, device: &Device, ceilings: &Ceilings) -> Result {
    let decoder = model(name, device, Precision::Bf16)?;
    let architecture = decoder.architecture().clone();
    let weights = 2.0 * elements(&decoder) as f64;
    for rows in [1usize, 64, 256] {
        let (prompt, new) = (128, 128);
        let mut generator = Generator::new(&decoder)?;
        let short = time(backend, 3, || generate(&mut generator, rows, prompt, 16))?;
        let long = time(backend, 3, || generate(&mut generator, rows, prompt, new + 16))?;
        let step = (long - short) / new as f64;
        let heads = architecture.attention(0);
        let middle = prompt + 16 + new / 2;
        let cache = (rows * middle * architecture.layers * 2 * 2 * heads.key_width()) as f64;
        let floor = (weights + cache) / ceilings.bytes;
        println!(
            "decode {name} B={rows}: {step:.3} ms a token, {:.0} tokens/s, floor {floor:.3} ms, {:.2} times the floor; \
             16 tokens with prefill and capture {short:.1} ms",
            rows as f64 / step * 1e3,
            step / floor
        );
    }
    Ok(())
}

fn batch(sequences: usize, len: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    (0..sequences).map(|i| (tokens(1, 7000 * i), tokens(len - 1, 7000 * i + 1))).collect()
}

fn pass(decoder: &Decoder, rows: &[(Vec<u32>, Vec<u32>)], gradients: &mut Gradients) -> Result {
    let batch = Batch::new(rows.iter().map(|(prompt, completion)| Sequence { prompt, completion }));
    let forward = decoder.forward(&batch, 1.0)?;
    let grad = forward.output().ones_like()?;
    forward.backward(&grad, gradients)?;
    Ok(())
}

fn train(name: &str, backend: &dyn GpuBackend, device: &Device, ceilings: &Ceilings) -> Result {
    let decoder = model(name, device, Precision::Bf16)?;
    let n = elements(&decoder);
    let (sequences, len) = (16, 512);
    let rows = batch(sequences, len);
    let mut gradients = Gradients::default();
    let forward = time(backend, 5, || {
        let batch = Batch::new(rows.iter().map(|(prompt, completion)| Sequence { prompt, completion }));
        decoder.logprobs(&batch, 1.0)?;
        Ok(())
    })?;
    let both = time(backend, 5, || pass(&decoder, &rows, &mut gradients))?;
    let architecture = decoder.architecture();
    let (t, heads) = ((sequences * len) as f64, architecture.attention(0));
    let attention = 6.0 * architecture.layers as f64 * t * len as f64 * heads.query_width() as f64;
    let flops = 6.0 * n as f64 * t + attention;
    println!(
        "train {name} {sequences} x {len}: forward {forward:.1} ms, forward and backward {both:.1} ms, {:.0} tokens/s, \
         {:.0} TFLOP/s, {:.1} % of the card's",
        t / both * 1e3,
        flops / both / 1e9,
        100.0 * flops / both / ceilings.flops
    );
    let gradients = gradients.complete(&decoder)?;
    let norm = time(backend, 5, || Ok(global_norm(&gradients).map(drop)?))?;
    print!("optimizer {name}: norm {norm:.2} ms (floor {:.2})", 4.0 * n as f64 / ceilings.bytes);
    for (moments, bytes) in [(MomentType::Full, 28.0), (MomentType::Bf16, 20.0), (MomentType::Int8, 16.0)] {
        let mut optimizer = AdamW::new(decoder.variables(), AdamWConfig { moments, ..Default::default() })?;
        let step = time(backend, 5, || Ok(optimizer.step(decoder.variables(), &gradients, 1e-9, 1.0)?))?;
        print!(", AdamW {moments:?} {step:.2} ms (floor {:.2})", bytes * n as f64 / ceilings.bytes);
    }
    println!();
    Ok(())
}

/// An operation of a backend.
#[derive(Clone)]
enum Operation {
    Launch(Launch),
    Gemm(Gemm),
    Copy(u64, u64, usize),
    Zero(u64, usize),
}

/// Waits for each operation and notes how often each kernel ran, and for how many milliseconds.
struct Clock {
    inner: Arc<dyn GpuBackend>,
    spent: Mutex<BTreeMap<String, (usize, f64)>>,
}

impl Clock {
    fn run(&self, operation: &Operation) -> candle_core::Result<()> {
        let name = match operation {
            Operation::Launch(launch) => launch.kernel,
            Operation::Gemm(gemm) if gemm.a.transposed => "(product, gradient of a weight)",
            Operation::Gemm(gemm) if gemm.b.transposed => "(product, forward)",
            Operation::Gemm(_) => "(product, gradient of an input)",
            Operation::Copy(..) => "(copy)",
            Operation::Zero(..) => "(zero)",
        };
        self.inner.synchronize()?;
        let start = Instant::now();
        match operation {
            Operation::Launch(launch) => self.inner.launch(launch),
            Operation::Gemm(gemm) => self.inner.gemm(gemm),
            Operation::Copy(from, to, bytes) => self.inner.copy(*from, *to, *bytes),
            Operation::Zero(pointer, bytes) => self.inner.zero(*pointer, *bytes),
        }?;
        self.inner.synchronize()?;
        let mut spent = self.spent.lock().map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        let entry = spent.entry(name.into()).or_default();
        *entry = (entry.0 + 1, entry.1 + start.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }
}

/// A backend whose operations are timed one by one, also those that it captures.
struct Timed {
    clock: Arc<Clock>,
    captured: Mutex<Option<Vec<Operation>>>,
}

impl Timed {
    fn run(&self, operation: Operation) -> candle_core::Result<()> {
        let mut captured = self.captured.lock().map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        match &mut *captured {
            Some(captured) => {
                captured.push(operation);
                Ok(())
            }
            None => self.clock.run(&operation),
        }
    }

    fn set(&self, value: Option<Vec<Operation>>) -> candle_core::Result<Option<Vec<Operation>>> {
        let mut captured = self.captured.lock().map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        Ok(std::mem::replace(&mut captured, value))
    }
}

impl GpuBackend for Timed {
    fn allocate(&self, bytes: usize) -> candle_core::Result<DeviceMemory> {
        self.clock.inner.allocate(bytes)
    }
    fn zero(&self, pointer: u64, bytes: usize) -> candle_core::Result<()> {
        self.run(Operation::Zero(pointer, bytes))
    }
    fn copy(&self, from: u64, to: u64, bytes: usize) -> candle_core::Result<()> {
        self.run(Operation::Copy(from, to, bytes))
    }
    fn upload(&self, from: &[u8], to: u64) -> candle_core::Result<()> {
        self.clock.inner.upload(from, to)
    }
    fn download(&self, from: u64, to: &mut [u8]) -> candle_core::Result<()> {
        self.clock.inner.download(from, to)
    }
    fn launch(&self, launch: &Launch) -> candle_core::Result<()> {
        self.run(Operation::Launch(launch.clone()))
    }
    fn gemm(&self, gemm: &Gemm) -> candle_core::Result<()> {
        self.run(Operation::Gemm(*gemm))
    }
    fn tensor(&self, tensor: &Tensor) -> candle_core::Result<u64> {
        self.clock.inner.tensor(tensor)
    }
    fn synchronize(&self) -> candle_core::Result<()> {
        self.clock.inner.synchronize()
    }
    fn capture(&self, f: &mut dyn FnMut() -> candle_core::Result<()>) -> candle_core::Result<Box<dyn LaunchGraph>> {
        self.set(Some(Vec::new()))?;
        let result = f();
        let operations = self.set(None)?.unwrap_or_default();
        result?;
        Ok(Box::new(Replay { clock: self.clock.clone(), operations }))
    }
}

struct Replay {
    clock: Arc<Clock>,
    operations: Vec<Operation>,
}

impl LaunchGraph for Replay {
    fn replay(&self) -> candle_core::Result<()> {
        self.operations.iter().try_for_each(|operation| self.clock.run(operation))
    }
}

/// Times of the kernels of a training pass and of generation, each waited for.
fn profile(name: &str, backend: &Arc<dyn GpuBackend>, device: &Device) -> Result {
    let clock = Arc::new(Clock { inner: backend.clone(), spent: Mutex::default() });
    let timed = Timed { clock: clock.clone(), captured: Mutex::default() };
    let decoder = model(name, device, Precision::Bf16)?.with_gpu_backend(Arc::new(timed));
    let take = || -> Result<BTreeMap<String, (usize, f64)>> {
        Ok(std::mem::take(&mut *clock.spent.lock().map_err(|e| e.to_string())?))
    };
    let show = |what: &str| -> Result {
        let mut all: Vec<_> = take()?.into_iter().collect();
        all.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        println!("profile {name}, {what}: {:.1} ms", all.iter().map(|(_, x)| x.1).sum::<f64>());
        for (kernel, (n, ms)) in all.into_iter().take(16) {
            println!("    {ms:8.2} ms  {n:5} x {:8.1} us  {kernel}", ms / n as f64 * 1e3);
        }
        Ok(())
    };
    let rows = batch(16, 512);
    let mut gradients = Gradients::default();
    pass(&decoder, &rows, &mut gradients)?;
    take()?;
    pass(&decoder, &rows, &mut gradients)?;
    show("a pass of 16 x 512")?;
    let mut generator = Generator::new(&decoder)?;
    generate(&mut generator, 64, 256, 16)?;
    take()?;
    generate(&mut generator, 64, 256, 16)?;
    show("16 tokens for 64 prompts of 256, with the prefill")
}

fn main() -> Result {
    let only = std::env::args().nth(1).filter(|a| !a.starts_with('-')).unwrap_or_default();
    let device = Devices::new(0)?.candle(Placement::Cuda(0))?;
    let backend = for_device(&device)?.ok_or("this build has no GPU support; build it with `--features cuda`")?;
    let ceilings = ceilings(&*backend, &device)?;
    let wants = |what: &str| only.is_empty() || what.contains(&only);
    if wants("products") {
        products(&*backend, &device)?;
    }
    for name in ["135M", "1.5B"] {
        if wants(&format!("decode {name}")) {
            decode(name, &*backend, &device, &ceilings)?;
        }
        if wants(&format!("train {name}")) {
            train(name, &*backend, &device, &ceilings)?;
        }
        if wants(&format!("profile {name}")) {
            profile(name, &backend, &device)?;
        }
    }
    Ok(())
}
