//! Kernels against their plain-candle twins, and matrix products by shape.
//!
//!     cargo bench --bench kernels

use std::hint::black_box;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rehearsal::lm::kernels::attention::Heads;
use rehearsal::lm::kernels::gemm::{Packed, View, gemm};
use rehearsal::lm::ops::{self, AttentionShape, Kernels};
use rehearsal::lm::random::Stream;

fn random(n: usize, id: u64) -> Vec<f32> {
    let stream = Stream::new(1, id);
    (0..n as u64).map(|i| stream.uniform(i) as f32 - 0.5).collect()
}

fn var(shape: (usize, usize), id: u64) -> Var {
    Var::from_vec(random(shape.0 * shape.1, id), shape, &Device::Cpu).expect("a variable")
}

/// Products of SmolLM2-135M's MLP: one row is a token of decoding, 1,024 a training batch.
fn products(c: &mut Criterion) {
    let (n, k) = (1536, 576);
    let weight = random(n * k, 2);
    let packed = Packed::new(View::new(&weight, n, k).t());
    let weight_t = Tensor::from_vec(weight.clone(), (n, k), &Device::Cpu).and_then(|t| t.t()).expect("a weight");
    let mut group = c.benchmark_group("product 576x1536");
    for rows in [1, 8, 32, 128, 1024] {
        let x = random(rows * k, 1);
        let tensor = Tensor::from_vec(x.clone(), (rows, k), &Device::Cpu).expect("rows");
        let mut out = vec![0.0; rows * n];
        group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
        group.bench_function(BenchmarkId::new("ours, packed once", rows), |b| {
            b.iter(|| gemm(View::new(&x, rows, k), &packed, black_box(&mut out), false))
        });
        group.bench_function(BenchmarkId::new("ours, packed each time", rows), |b| {
            b.iter(|| {
                gemm(View::new(&x, rows, k), &Packed::new(View::new(&weight, n, k).t()), black_box(&mut out), false)
            })
        });
        group.bench_function(BenchmarkId::new("candle", rows), |b| b.iter(|| black_box(tensor.matmul(&weight_t))));
    }
    group.finish();
}

/// Forward and backward of an operation, fused and plain.
fn both(c: &mut Criterion, name: &str, inputs: &[Var], f: impl Fn(&[Tensor], Kernels) -> candle_core::Result<Tensor>) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let mut group = c.benchmark_group(name);
    for (label, kernels) in [("fused", Kernels::Fused), ("plain", Kernels::Plain)] {
        group.bench_function(BenchmarkId::new("forward", label), |b| b.iter(|| black_box(f(&tensors, kernels))));
        group.bench_function(BenchmarkId::new("forward + backward", label), |b| {
            b.iter(|| f(&tensors, kernels).and_then(|y| y.sum_all()).and_then(|y| y.backward()))
        });
    }
    group.finish();
}

fn operations(c: &mut Criterion) {
    let tokens = 512;
    both(
        c,
        "rms-norm 512x576",
        &[var((tokens, 576), 1), Var::from_vec(random(576, 2), 576, &Device::Cpu).expect("a weight")],
        |x, k| ops::rms_norm(&x[0], &x[1], 1e-5, k),
    );
    both(c, "swiglu 512x1536", &[var((tokens, 1536), 1), var((tokens, 1536), 2)], |x, k| ops::swiglu(&x[0], &x[1], k));
    let heads = Heads { queries: 9, keys: 3, dim: 64, scale: 0.125, window: None };
    let shape = AttentionShape { heads, offsets: Arc::new((0..=4).map(|i| i * 128).collect()) };
    both(
        c,
        "attention 4x128, 9/3 heads",
        &[var((tokens, 576), 1), var((tokens, 192), 2), var((tokens, 192), 3)],
        |x, k| ops::attention(&x[0], &x[1], &x[2], &shape, k),
    );
    let targets: Vec<u32> = (0..128).map(|i| (i * 377) % 49_152).collect();
    both(c, "head 128x49152", &[var((128, 576), 1), var((49_152, 576), 2)], |x, k| {
        ops::head_logprobs(&x[0], &x[1], &targets, 1.0, k)
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = products, operations
}
criterion_main!(benches);
