//! Whole passes of a model with the shape of SmolLM2-135M and random weights: generation, log-probabilities, forward
//! and backward, in f32 and bf16, and how their cost grows.
//!
//!     cargo bench --bench whole                  # everything, some minutes
//!     cargo bench --bench whole -- generate      # what matches

// What the command runs on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "../runtime/main/heap.rs"]
mod heap;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use rehearsal::lm::generate::{Generator, Options, Request, Sampling};
use rehearsal::lm::random::Stream;
use rehearsal::lm::{Architecture, Batch, Decoder, Gradients, Parameters, Precision, Sequence};

const PRECISIONS: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

fn model(precision: Precision) -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true,
    });
    let architecture = Architecture::from_json(&config).expect("an architecture");
    let parameters: Parameters = architecture
        .parameters()
        .into_iter()
        .enumerate()
        .map(|(id, (name, shape))| {
            let stream = Stream::new(1, id as u64);
            let n: usize = shape.iter().product();
            let norm = shape.len() == 1;
            let data: Vec<f32> =
                (0..n as u64).map(|i| if norm { 1.0 } else { (stream.uniform(i) as f32 - 0.5) * 0.07 }).collect();
            (name, Tensor::from_vec(data, shape, &Device::Cpu).expect("a parameter"))
        })
        .collect();
    Decoder::trainable(architecture, parameters).expect("a decoder").with_precision(precision)
}

fn tokens(n: usize, id: u64) -> Vec<u32> {
    let stream = Stream::new(2, id);
    (0..n as u64).map(|i| (stream.uniform(i) * 49_152.0) as u32).collect()
}

/// Prompts of `prompt` tokens with `each` completions of `new` tokens.
struct Work {
    prompts: Vec<Vec<u32>>,
    completions: Vec<Vec<u32>>,
}

impl Work {
    fn new(prompts: usize, prompt: usize, each: usize, new: usize) -> Self {
        Self {
            prompts: (0..prompts).map(|i| tokens(prompt, i as u64)).collect(),
            completions: (0..prompts * each).map(|i| tokens(new, 1000 + i as u64)).collect(),
        }
    }

    fn batch(&self) -> Batch {
        let each = self.completions.len() / self.prompts.len();
        Batch::new(
            self.completions
                .iter()
                .enumerate()
                .map(|(i, completion)| Sequence { prompt: &self.prompts[i / each], completion }),
        )
    }

    /// Tokens of the work without sharing: what a padded trainer would run.
    fn tokens(&self) -> usize {
        let each = self.completions.len() / self.prompts.len();
        self.prompts.iter().map(|p| p.len() * each).sum::<usize>()
            + self.completions.iter().map(Vec::len).sum::<usize>()
    }
}

fn train(decoder: &Decoder, batch: &Batch) {
    let forward = decoder.forward(batch, 1.0).expect("a forward pass");
    let grad = forward.output().ones_like().expect("a gradient");
    let mut gradients = Gradients::default();
    forward.backward(&grad, &mut gradients).expect("a backward pass");
}

/// Generates, and says when each pass began.
fn decode(generator: &mut Generator, prompts: &[Vec<u32>], each: usize, new: usize) -> Vec<Instant> {
    let prompts: Vec<_> = prompts.iter().cloned().map(Arc::new).collect();
    let requests = (0..prompts.len() * each)
        .map(|i| Request { id: i as u64, prompt: prompts[i / each].clone() })
        .collect::<Vec<_>>();
    let options = Options {
        sampling: Sampling { temperature: 0.9, ..Sampling::default() },
        max_new_tokens: new,
        min_new_tokens: new,
        eos: vec![2],
        stop: Vec::new(),
        seed: 1,
        batch: requests.len(),
    };
    let began = RefCell::<Vec<Instant>>::default();
    // It is asked before every pass whether to stop.
    let note = || {
        began.borrow_mut().push(Instant::now());
        false
    };
    generator.generate(requests, &options, None, &note, &mut |_| {}).expect("completions");
    began.into_inner()
}

/// New tokens per second by batch, prompts of 40 tokens.
fn generation(c: &mut Criterion) {
    let mut group = c.benchmark_group("generate 48 tokens");
    for (name, precision) in PRECISIONS {
        let mut generator = Generator::new(&model(precision)).expect("a generator");
        for batch in [1, 8, 16, 64] {
            let work = Work::new(batch, 40, 1, 1);
            group.throughput(Throughput::Elements((batch * 48) as u64));
            group.bench_function(BenchmarkId::new(name, batch), |b| {
                b.iter(|| drop(decode(&mut generator, &work.prompts, 1, 48)))
            });
        }
    }
    group.finish();
}

/// One token for each of 16 sequences, prompts and their passes left out: what is called decoding.
fn decoding(c: &mut Criterion) {
    const SEQUENCES: usize = 16;
    let mut group = c.benchmark_group("decode a token");
    for (name, precision) in PRECISIONS {
        let mut generator = Generator::new(&model(precision)).expect("a generator");
        let work = Work::new(SEQUENCES, 40, 1, 1);
        group.throughput(Throughput::Elements(SEQUENCES as u64));
        group.bench_function(BenchmarkId::new(name, SEQUENCES), |b| {
            b.iter_custom(|times| {
                let mut taken = Duration::ZERO;
                let mut left = times as u32;
                while left > 0 {
                    let began = decode(&mut generator, &work.prompts, 1, 48);
                    // Two passes read the prompts; the last has fewer rows, and its end is not noted.
                    let passes = &began[2..];
                    let count = left.min(passes.len() as u32 - 1);
                    taken += (passes[passes.len() - 1] - passes[0]) * count / (passes.len() as u32 - 1);
                    left -= count;
                }
                taken
            })
        });
    }
    group.finish();
}

/// Training passes: tokens per second by number of sequences, length, and completions per prompt.
fn training(c: &mut Criterion) {
    for (name, precision) in PRECISIONS {
        let decoder = model(precision);
        let mut run = |group: &str, id: usize, work: Work| {
            let mut group = c.benchmark_group(format!("{group} {name}"));
            group.throughput(Throughput::Elements(work.tokens() as u64));
            let batch = work.batch();
            group.bench_function(BenchmarkId::from_parameter(id), |b| b.iter(|| train(&decoder, &batch)));
            group.finish();
        };
        run("8 x 128 tokens", 8, Work::new(8, 1, 1, 128));
        for sequences in [1, 4, 16, 64] {
            run("by sequences of 64 tokens", sequences, Work::new(sequences, 1, 1, 64));
        }
        for length in [64, 256, 1024, 2048] {
            run("by length, 2,048 tokens in all", length, Work::new(2048 / length, 1, 1, length));
        }
        for each in [1, 2, 4, 16] {
            run("by completions of a prompt of 128", each, Work::new(1, 128, each, 32));
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = generation, decoding, training
}

fn main() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    heap::configure();
    // As in a job: the passes run inside the pool, so that no call waits for a worker to wake up.
    let pool = rayon::ThreadPoolBuilder::new().build().expect("a thread pool");
    pool.install(benches);
    Criterion::default().configure_from_args().final_summary();
}
