//! AdamW's arithmetic on the CPU: updates parameter and moments in one pass over memory.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use rehearsal_kernels::per_isa;

use super::moments::{Moment, Moments, QUANTUM, SIGNED, UNSIGNED, decode, encode, round_stochastic};

/// Elements per task: a multiple of the block of eight-bit moments.
const BLOCK: usize = 64 * 1024;

/// The constants of a step.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub beta1: f64,
    pub beta2: f64,
    /// Factor on the parameter (weight decay).
    pub decay: f64,
    pub rate: f64,
    /// Divisor of the root of the second moment (bias correction).
    pub root: f64,
    pub eps: f64,
    /// Factor on the gradient (clipping).
    pub scale: f64,
    /// Seeds of stochastic rounding of the first and the second moment.
    pub salts: [u32; 2],
    /// Index in the parameter of the first element that is updated, for the seeds.
    pub from: u32,
}

/// Updates a parameter and its moments in place.
pub fn update(parameter: &Tensor, moments: &Moments, gradient: &Tensor, rule: Rule) -> Result<()> {
    let (storage, layout) = gradient.storage_and_layout();
    let Storage::Cpu(gradient) = &*storage else { bail!("a gradient is not on the device of its parameter") };
    let g = range(layout)?;
    change(parameter, |p, pr| {
        change(&moments.first.values, |m, mr| {
            change(&moments.second.values, |v, vr| match (p, m, v, gradient) {
                (CpuStorage::F32(p), CpuStorage::F32(m), CpuStorage::F32(v), CpuStorage::F32(x)) => {
                    full_f32(&mut p[pr], &mut m[mr], &mut v[vr], &x[g], rule);
                    Ok(())
                }
                (CpuStorage::F64(p), CpuStorage::F64(m), CpuStorage::F64(v), CpuStorage::F64(x)) => {
                    full_f64(&mut p[pr], &mut m[mr], &mut v[vr], &x[g], rule);
                    Ok(())
                }
                (CpuStorage::F32(p), CpuStorage::BF16(m), CpuStorage::BF16(v), CpuStorage::F32(x)) => {
                    half(&mut p[pr], &mut m[mr], &mut v[vr], &x[g], rule);
                    Ok(())
                }
                (CpuStorage::F32(p), CpuStorage::U8(m), CpuStorage::U8(v), CpuStorage::F32(x)) => {
                    scaled(&moments.first, |ms| {
                        scaled(&moments.second, |vs| {
                            let (m, v) = ((&mut m[mr], ms), (&mut v[vr], vs));
                            eight(&mut p[pr], m, v, &x[g], rule);
                            Ok(())
                        })
                    })
                }
                _ => bail!("types of a parameter, its moments and its gradient do not match"),
            })
        })
    })
}

macro_rules! full {
    ($name:ident, $t:ty) => {
        fn $name(p: &mut [$t], m: &mut [$t], v: &mut [$t], g: &[$t], rule: Rule) {
            per_isa! {
                fn chunk(p: &mut [$t], m: &mut [$t], v: &mut [$t], g: &[$t], r: Numbers<$t>) {
                    for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                        (*m, *v) = r.blend(*m, *v, g);
                        *p = r.moved(*p, *m, *v);
                    }
                }
            }
            let r = Numbers::<$t>::new(rule);
            let chunks = p.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
            chunks.zip(g.par_chunks(BLOCK)).for_each(|(((p, m), v), g)| chunk(p, m, v, g, r));
        }
    };
}
full!(full_f32, f32);
full!(full_f64, f64);

fn half(p: &mut [f32], m: &mut [bf16], v: &mut [bf16], g: &[f32], rule: Rule) {
    per_isa! {
        fn chunk(p: &mut [f32], m: &mut [u16], v: &mut [u16], g: &[f32], r: Numbers<f32>, from: u32, salts: [u32; 2]) {
            for (i, (((p, m), v), &g)) in p.iter_mut().zip(m).zip(v).zip(g).enumerate() {
                let seed = from.wrapping_add(i as u32);
                let widened = |x: u16| f32::from_bits((x as u32) << 16);
                let (first, second) = r.blend(widened(*m), widened(*v), g);
                *m = round_stochastic(first, seed ^ salts[0]);
                *v = round_stochastic(second, seed ^ salts[1]);
                *p = r.moved(*p, widened(*m), widened(*v));
            }
        }
    }
    let r = Numbers::<f32>::new(rule);
    let chunks = p.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    chunks.zip(g.par_chunks(BLOCK)).enumerate().for_each(|(block, (((p, m), v), g))| {
        let (m, v) = (m.reinterpret_cast_mut(), v.reinterpret_cast_mut());
        chunk(p, m, v, g, r, rule.from.wrapping_add((block * BLOCK) as u32), rule.salts);
    });
}

/// Eight-bit codes of a moment, and the scales of their blocks.
type Codes<'a> = (&'a mut [u8], &'a mut [f32]);

fn eight(p: &mut [f32], (m, ms): Codes<'_>, (v, vs): Codes<'_>, g: &[f32], rule: Rule) {
    per_isa! {
        fn block(p: &mut [f32], m: (&mut [u8], &mut f32), v: (&mut [u8], &mut f32), g: &[f32], r: Numbers<f32>, from: u32, salts: [u32; 2]) {
            let n = p.len().min(QUANTUM);
            let ((m, m_scale), (v, v_scale)) = ((&mut m.0[..n], m.1), (&mut v.0[..n], v.1));
            let (p, g) = (&mut p[..n], &g[..n]);
            let (mut first, mut second) = ([0.0f32; QUANTUM], [0.0f32; QUANTUM]);
            let (first, second) = (&mut first[..n], &mut second[..n]);
            for i in 0..n {
                let old = decode(u32::from(v[i]), UNSIGNED) * *v_scale;
                (first[i], second[i]) = r.blend(signed(m[i]) * *m_scale, old, g[i]);
            }
            let (m_top, v_top) = (largest(first), largest(second));
            (*m_scale, *v_scale) = (m_top, v_top);
            let inverse = |top: f32| if top > 0.0 { 1.0 / top } else { 0.0 };
            let (m_inverse, v_inverse) = (inverse(m_top), inverse(v_top));
            for i in 0..n {
                let seed = from.wrapping_add(i as u32);
                let x = first[i] * m_inverse;
                m[i] = encode(x.abs(), SIGNED, seed ^ salts[0]) as u8 | if x < 0.0 { 128 } else { 0 };
                v[i] = encode(second[i] * v_inverse, UNSIGNED, seed ^ salts[1]) as u8;
            }
            for i in 0..n {
                p[i] = r.moved(p[i], signed(m[i]) * m_top, decode(u32::from(v[i]), UNSIGNED) * v_top);
            }
        }
    }
    let r = Numbers::<f32>::new(rule);
    let codes = m.par_chunks_mut(QUANTUM).zip(v.par_chunks_mut(QUANTUM)).zip(ms.par_iter_mut().zip(vs));
    let blocks = p.par_chunks_mut(QUANTUM).zip(g.par_chunks(QUANTUM)).zip(codes).enumerate();
    blocks.with_min_len(BLOCK / QUANTUM).for_each(|(at, ((p, g), ((m, v), (m_scale, v_scale))))| {
        let from = rule.from.wrapping_add((at * QUANTUM) as u32);
        block(p, (m, m_scale), (v, v_scale), g, r, from, rule.salts);
    });
}

/// The largest magnitude. It does not depend on the order, so it is computed in lanes.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let (whole, rest) = x.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(0.0, |top, x| if x.abs() > top { x.abs() } else { top })
}

/// The value of a code with a sign bit.
#[inline(always)]
fn signed(code: u8) -> f32 {
    let size = decode(u32::from(code & 127), SIGNED);
    if code & 128 == 0 { size } else { -size }
}

/// The constants of a step in the type of the parameter.
#[derive(Clone, Copy)]
struct Numbers<T> {
    keep: [T; 2],
    take: [T; 2],
    decay: T,
    rate: T,
    root: T,
    eps: T,
    scale: T,
}

macro_rules! numbers {
    ($t:ty) => {
        impl Numbers<$t> {
            fn new(r: Rule) -> Self {
                Self {
                    keep: [r.beta1 as $t, r.beta2 as $t],
                    take: [(1.0 - r.beta1) as $t, (1.0 - r.beta2) as $t],
                    decay: r.decay as $t,
                    rate: r.rate as $t,
                    root: r.root as $t,
                    eps: r.eps as $t,
                    scale: r.scale as $t,
                }
            }

            /// The moments, updated by a gradient.
            #[inline(always)]
            fn blend(&self, m: $t, v: $t, g: $t) -> ($t, $t) {
                let g = g * self.scale;
                (self.keep[0] * m + self.take[0] * g, self.keep[1] * v + self.take[1] * (g * g))
            }

            /// The parameter, updated by the moments.
            #[inline(always)]
            fn moved(&self, p: $t, m: $t, v: $t) -> $t {
                p * self.decay - self.rate * m / (v.sqrt() / self.root + self.eps)
            }
        }
    };
}
numbers!(f32);
numbers!(f64);

fn range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(from..to),
        None => bail!("a tensor of the optimizer is not contiguous"),
    }
}

/// Runs `f` on the scales of an eight-bit moment.
fn scaled(moment: &Moment, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    let Some(scales) = &moment.scales else { bail!("an eight-bit moment has no scales") };
    change(scales, |storage, range| match storage {
        CpuStorage::F32(scales) => f(&mut scales[range]),
        _ => bail!("scales must be f32"),
    })
}

/// Runs `f` on a tensor's storage and range, to update it in place.
fn change(tensor: &Tensor, f: impl FnOnce(&mut CpuStorage, Range<usize>) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Change(Cell::new(Some(f))))
}

struct Change<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut CpuStorage, Range<usize>) -> Result<()>> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match self.0.take() {
            Some(f) => f(storage, range(layout)?),
            None => bail!("an in-place update ran twice"),
        }
    }
}
