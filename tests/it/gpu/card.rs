//! What only a real GPU can show.

use std::sync::{Arc, Mutex, OnceLock};

use rehearsal::Devices;
use rehearsal::actors::Placement;
use rehearsal::lm::generate::{Generator, Options, Request, Sampling};
use rehearsal::lm::random::Stream;
use rehearsal_kernels::gpu::{Buffer, ElementType, Factor, Gemm, GpuBackend, for_device};

use super::{Board, board};
use crate::support::jobs::gpu;

/// The GPU, opened once as a job opens it.
pub fn open(name: &str) -> Board {
    static OPEN: OnceLock<Mutex<Option<Board>>> = OnceLock::new();
    let mut open = OPEN.get_or_init(Mutex::default).lock().unwrap();
    let board = open.get_or_insert_with(|| {
        let placement: Placement = name.parse().unwrap();
        let device = Devices::new(1).unwrap().candle(placement).unwrap_or_else(|e| panic!("{e}"));
        Board { backend: for_device(&device).unwrap().expect("a GPU"), device }
    });
    board.clone()
}

fn uploaded(backend: &dyn GpuBackend, values: &[f32], element: ElementType) -> Buffer {
    let mut buffer = Buffer::empty(element);
    buffer.resize(backend, values.len()).unwrap();
    match element {
        ElementType::F32 => backend.upload(bytemuck::cast_slice(values), buffer.pointer()).unwrap(),
        ElementType::Bf16 => {
            let narrow: Vec<u16> = values.iter().map(|&x| rehearsal_kernels::gemm::round_bf16(x)).collect();
            backend.upload(bytemuck::cast_slice(&narrow), buffer.pointer()).unwrap();
        }
    }
    buffer
}

/// A product of the first `rows` rows, as bits.
fn product(backend: &dyn GpuBackend, (a, b): (&Buffer, &Buffer), shape: (usize, usize, usize)) -> Vec<u32> {
    let (rows, depth, columns) = shape;
    let mut c = Buffer::empty(ElementType::F32);
    c.resize(backend, rows * columns).unwrap();
    let gemm = Gemm {
        rows,
        depth,
        columns,
        element: a.element,
        a: Factor { pointer: a.pointer(), stride: depth, transposed: false },
        b: Factor { pointer: b.pointer(), stride: depth, transposed: true },
        c: c.pointer(),
        c_stride: columns,
        c_element: ElementType::F32,
        add: false,
    };
    backend.gemm(&gemm).unwrap();
    let mut bits = vec![0u32; rows * columns];
    backend.download(c.pointer(), bytemuck::cast_slice_mut(&mut bits)).unwrap();
    bits
}

#[test]
fn a_row_of_a_product_does_not_depend_on_its_neighbours() {
    let Some(_) = gpu() else { return };
    let backend = board().unwrap().backend;
    let stream = Stream::new(1, 1);
    for element in [ElementType::F32, ElementType::Bf16] {
        for (depth, columns) in [(576, 960), (576, 49_152), (1536, 576), (64, 512), (24, 61)] {
            let values =
                |n: usize, from: u64| (0..n as u64).map(|i| stream.normal(from + i) as f32).collect::<Vec<_>>();
            let most = 3000;
            let a = uploaded(&*backend, &values(most * depth, 0), element);
            let b = uploaded(&*backend, &values(columns * depth, 1 << 40), element);
            let many = product(&*backend, (&a, &b), (most, depth, columns));
            for rows in [1, 2, 15, 16, 17, 63, 64, 65, 200, 256, 300, 1024, 2047] {
                let few = product(&*backend, (&a, &b), (rows, depth, columns));
                let wrong = few.iter().zip(&many).filter(|(x, y)| x != y).count();
                assert_eq!(wrong, 0, "{element:?}, {depth} x {columns}: {rows} rows against {most}");
            }
        }
    }
}

#[test]
fn launches_are_captured_while_other_threads_use_the_device() {
    let Some(_) = gpu() else { return };
    let board = board().unwrap();
    let decoder = board.on(&super::models::model("llama", 16, serde_json::json!({})));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let complete = |seed: u64| {
        let requests = (0..9).map(|id| Request { id, prompt: Arc::new(vec![3, 4, 5]) }).collect();
        let sampling = Sampling { temperature: 0.8, ..Default::default() };
        let (max_new_tokens, min_new_tokens) = (37, 0);
        let options = Options { sampling, max_new_tokens, min_new_tokens, eos: vec![2], stop: vec![], seed, batch: 9 };
        let mut all = Vec::new();
        let mut generator = Generator::new(&decoder).unwrap();
        generator.generate(requests, &options, None, &|| false, &mut |c| all.push((c.id, c.tokens))).unwrap();
        all.sort();
        all
    };
    let quiet = complete(5);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for tensor in decoder.parameters().into_values() {
                        tensor.to_device(&candle_core::Device::Cpu).unwrap();
                        drop((tensor + 1.0).unwrap());
                    }
                }
            });
        }
        for _ in 0..20 {
            assert_eq!(complete(5), quiet);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
