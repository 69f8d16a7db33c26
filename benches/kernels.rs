//! Every kernel against its plain-candle twin, and matrix products by shape and precision.
//!
//!     cargo bench --bench kernels
//!     cargo bench --bench kernels -- attention      # what matches

// What the command runs on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "../runtime/main/heap.rs"]
mod heap;

use std::hint::black_box;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use rehearsal::learn::{AdamW, AdamWConfig, MomentType};
use rehearsal::lm::generate::{Sampling, Scratch};
use rehearsal::lm::ops::{self, AttentionShape, Positions};
use rehearsal_kernels::activation::{self, Activation};
use rehearsal_kernels::attention::{self, Family, Heads};
use rehearsal_kernels::gemm::{Packed, Precision, View, gemm};
use rehearsal_kernels::head::{self, Targets};
use rehearsal_kernels::norm;
use rehearsal_kernels::random::Stream;
use rehearsal_kernels::rope::{Angles, rotate};

fn random(n: usize, id: u64) -> Vec<f32> {
    let stream = Stream::new(1, id);
    (0..n as u64).map(|i| stream.uniform(i) as f32 - 0.5).collect()
}

fn var(shape: &[usize], id: u64) -> Var {
    Var::from_vec(random(shape.iter().product(), id), shape, &Device::Cpu).expect("a variable")
}

/// Products of SmolLM2-135M's MLP: one row is a token of decoding, 1,024 a training batch.
fn products(c: &mut Criterion) {
    let (n, k) = (1536, 576);
    let weight = random(n * k, 2);
    let weight_t = Tensor::from_vec(weight.clone(), (n, k), &Device::Cpu).and_then(|t| t.t()).expect("a weight");
    let mut group = c.benchmark_group("product 576x1536");
    for rows in [1, 8, 16, 32, 128, 1024] {
        let x = random(rows * k, 1);
        let tensor = Tensor::from_vec(x.clone(), (rows, k), &Device::Cpu).expect("rows");
        let mut out = vec![0.0; rows * n];
        group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
        for (name, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let packed = Packed::new(View::new(&weight, n, k).t(), precision);
            group.bench_function(BenchmarkId::new(format!("{name}, packed once"), rows), |b| {
                b.iter(|| gemm(View::new(&x, rows, k), &packed, black_box(&mut out), false))
            });
            let mut packed = Packed::empty(precision);
            group.bench_function(BenchmarkId::new(format!("{name}, packed each time"), rows), |b| {
                b.iter(|| {
                    packed.fill(&[View::new(&weight, n, k).t()], true);
                    gemm(View::new(&x, rows, k), &packed, black_box(&mut out), false)
                })
            });
        }
        group.bench_function(BenchmarkId::new("candle f32", rows), |b| b.iter(|| black_box(tensor.matmul(&weight_t))));
    }
    group.finish();
}

/// A kernel, forward and backward, against the graph.
fn against_graph(
    c: &mut Criterion,
    name: &str,
    mut forward: impl FnMut(),
    mut backward: impl FnMut(),
    inputs: &[Var],
    graph: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let mut group = c.benchmark_group(name);
    group.bench_function("forward/kernel", |b| b.iter(&mut forward));
    group.bench_function("forward/graph", |b| b.iter(|| black_box(graph(&tensors))));
    group.bench_function("forward + backward/kernel", |b| {
        b.iter(|| {
            forward();
            backward();
        })
    });
    group.bench_function("forward + backward/graph", |b| {
        b.iter(|| graph(&tensors).and_then(|y| y.sum_all()).and_then(|y| y.backward()))
    });
    group.finish();
}

const TOKENS: usize = 512;

fn rows(c: &mut Criterion) {
    let (x, w, grad) = (random(TOKENS * 576, 1), random(576, 2), random(TOKENS * 576, 3));
    let (mut out, mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; 576]);
    against_graph(
        c,
        "rms-norm 512x576",
        || norm::rms_norm(&x, &w, 1e-5, &mut out),
        || norm::rms_norm_backward(&x, &w, 1e-5, &grad, &mut dx, &mut dw),
        &[var(&[TOKENS, 576], 1), var(&[576], 2)],
        |x| ops::rms_norm(&x[0], &x[1], 1e-5),
    );
    let (x, w, b, grad) = (random(TOKENS * 576, 1), random(576, 2), random(576, 3), random(TOKENS * 576, 4));
    let (mut out, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let (mut dw, mut db) = (vec![0.0; 576], vec![0.0; 576]);
    against_graph(
        c,
        "layer-norm 512x576",
        || norm::layer_norm(&x, &w, &b, 1e-5, &mut out),
        || norm::layer_norm_backward(&x, &w, 1e-5, &grad, &mut dx, &mut dw, &mut db),
        &[var(&[TOKENS, 576], 1), var(&[576], 2), var(&[576], 3)],
        |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-5),
    );
    for (name, kind) in [("swiglu 512x1536", Activation::Silu), ("geglu 512x1536", Activation::GeluTanh)] {
        let (x, grad) = (random(TOKENS * 3072, 1), random(TOKENS * 1536, 2));
        let (mut out, mut gate_up) = (vec![0.0; grad.len()], x.clone());
        against_graph(
            c,
            name,
            || activation::forward(kind, true, 1536, &x, &mut out),
            || activation::backward(kind, true, 1536, &mut gate_up, &grad),
            &[var(&[TOKENS, 1536], 1), var(&[TOKENS, 1536], 2)],
            |x| if kind == Activation::Silu { ops::swiglu(&x[0], &x[1]) } else { ops::geglu(&x[0], &x[1]) },
        );
    }
    let frequencies: Vec<f32> = (0..32).map(|i| 1e5f32.powf(-i as f32 / 32.0)).collect();
    let angles = Arc::new(Angles::new(&frequencies, TOKENS));
    let at: Vec<u32> = (0..TOKENS as u32).collect();
    let positions = Positions::new(angles.clone(), at.clone());
    let (mut x, mut grad) = (random(TOKENS * 576, 1), random(TOKENS * 576, 2));
    against_graph(
        c,
        "rope 512x9 heads",
        || rotate(&mut x, 576, &angles, &at, false),
        || rotate(&mut grad, 576, &angles, &at, true),
        &[var(&[TOKENS, 576], 1)],
        |x| ops::rope(&x[0], 64, &positions),
    );
}

fn attention(c: &mut Criterion) {
    let heads = Heads { queries: 9, keys: 3, dim: 64, scale: 0.125, window: None, softcap: None };
    let sequences = |n: usize| -> Vec<Family> {
        let len = TOKENS / n;
        (0..n).map(|i| Family::alone(i * len..(i + 1) * len)).collect()
    };
    for (name, families) in [("attention 4x128, 9/3 heads", sequences(4)), ("attention 1x512, 9/3 heads", sequences(1))]
    {
        let (qkv, grad) = (random(TOKENS * heads.width(), 1), random(TOKENS * 576, 2));
        let (mut out, mut lse) = (vec![0.0; TOKENS * 576], vec![0.0; TOKENS * 9]);
        attention::forward(&qkv, &families, &heads, &mut out, &mut lse);
        let (kept_out, kept_lse, mut d_qkv) = (out.clone(), lse.clone(), vec![0.0; qkv.len()]);
        let shape = AttentionShape { heads, families: Arc::new(families.clone()) };
        against_graph(
            c,
            name,
            || attention::forward(&qkv, &families, &heads, &mut out, &mut lse),
            || {
                let saved = attention::Saved { qkv: &qkv, out: &kept_out, lse: &kept_lse, grad: &grad };
                attention::backward(saved, &families, &heads, &mut d_qkv);
            },
            &[var(&[TOKENS, 576], 1), var(&[TOKENS, 192], 2), var(&[TOKENS, 192], 3)],
            |x| ops::attention(&x[0], &x[1], &x[2], &shape),
        );
    }
}

fn language_model_head(c: &mut Criterion) {
    let tokens: Vec<u32> = (0..128).map(|i| (i * 377) % 49_152).collect();
    let (hidden, weight, grad) = (random(128 * 576, 1), random(49_152 * 576, 2), random(128, 3));
    let targets = Targets { tokens: &tokens, temperature: 1.0, softcap: None };
    for (name, precision) in [("head 128x49152", Precision::F32), ("head 128x49152 bf16", Precision::Bf16)] {
        let view = View::new(&weight, 49_152, 576);
        let (_, lse) = head::logprobs(&hidden, view, targets, precision);
        let mut dw = vec![0.0; weight.len()];
        against_graph(
            c,
            name,
            || drop(black_box(head::logprobs(&hidden, view, targets, precision))),
            || {
                let saved = head::Saved { hidden: &hidden, lse: &lse, grad: &grad, entropy: None };
                black_box(head::backward(&saved, view, targets, &mut dw, precision));
            },
            &[var(&[128, 576], 1), var(&[49_152, 576], 2)],
            |x| ops::logprobs(&ops::linear(&x[0], &x[1])?, &tokens, 1.0, false),
        );
    }
}

fn optimiser(c: &mut Criterion) {
    let mut group = c.benchmark_group("adamw, 10 M parameters");
    let variables = [("w".to_string(), var(&[10_000, 1000], 1))].into();
    let gradients = [("w".to_string(), var(&[10_000, 1000], 2).as_detached_tensor())].into();
    group.throughput(Throughput::Elements(10_000_000));
    let kinds =
        [("f32 moments", MomentType::Full), ("bf16 moments", MomentType::Bf16), ("8-bit moments", MomentType::Int8)];
    for (name, moments) in kinds {
        let mut adamw = AdamW::new(&variables, AdamWConfig { moments, ..Default::default() }).expect("an optimiser");
        group.bench_function(name, |b| b.iter(|| adamw.step(&variables, &gradients, 1e-6, 1.0)));
    }
    group.finish();
}

fn sampling(c: &mut Criterion) {
    let logits: Vec<f32> = random(49_152, 1).into_iter().map(|x| x * 20.0).collect();
    let mut group = c.benchmark_group("draw from 49,152");
    let with = |top_k, top_p| Sampling { temperature: 0.9, top_k, top_p, min_p: 0.0 };
    for (name, sampling) in [("all", with(0, 1.0)), ("top-k 50", with(50, 1.0)), ("top-p 0.9", with(0, 0.9))] {
        let mut scratch = Scratch::default();
        group.bench_function(name, |b| b.iter(|| black_box(sampling.draw(&logits, &[], 0.37, &mut scratch))));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = products, rows, attention, language_model_head, optimiser, sampling
}

fn main() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    heap::configure();
    // As in a job: kernels run inside the pool, so that no call waits for a worker to wake up.
    let pool = rayon::ThreadPoolBuilder::new().build().expect("a thread pool");
    pool.install(benches);
    Criterion::default().configure_from_args().final_summary();
}
