//! Matrix products of a CUDA device.
//!
//! Where the rows of `a` are rows of a batch, cuBLASLt computes the product by an algorithm that depends on the weight's shape and
//! not on the number of rows, without splitting the summed index: the bits of a row do not depend on the rows beside it. Few rows
//! are computed faster by other algorithms; one of them is used if, on this device, its results have the same bits.
//!
//! Other products (gradients of weights, which sum over the rows of a batch) are cuBLAS's.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result::gemm_ex, sys as blas};
use candle_core::cuda_backend::cudarc::cublaslt::{result as lt, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};
use candle_core::{Result, bail};

use super::memory::Allocated;
use crate::gpu::backend::{Factor, Gemm};
use crate::gpu::source::ElementType;

/// Bytes of cuBLAS's workspace, which is allocated beforehand: no memory may be allocated while launches are captured.
const WORKSPACE: usize = 32 << 20;

/// Rows for which algorithms are chosen: those of a product are rounded up to one of them, or down to the last.
const ROWS: [usize; 5] = [16, 64, 256, 1024, 8192];

/// Algorithms that are considered for a number of rows.
const CANDIDATES: usize = 8;

/// Rows on which two algorithms are compared.
const COMPARED: usize = 64;

/// Bytes that the addresses of factors are multiples of, at most, as far as algorithms care.
const ALIGNMENT: usize = 16;

/// cuBLAS on one stream, with its workspace.
pub struct Blas {
    handle: CudaBlas,
    _workspace: Allocated,
}

impl Blas {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = CudaBlas::new(stream.clone()).w()?;
        let workspace = Allocated::new(stream, WORKSPACE)?;
        // SAFETY: the workspace lives as long as the handle.
        unsafe { blas::cublasSetWorkspace_v2(*handle.handle(), workspace.pointer as *mut c_void, WORKSPACE) }
            .result()
            .w()?;
        Ok(Self { handle, _workspace: workspace })
    }

    /// Computes a product by the algorithm that cuBLAS chooses for its shape.
    pub fn gemm(&self, p: &Gemm) -> Result<()> {
        let operation = |factor: &Factor| match factor.transposed {
            false => blas::cublasOperation_t::CUBLAS_OP_N,
            true => blas::cublasOperation_t::CUBLAS_OP_T,
        };
        let data_type = |element| match element {
            ElementType::F32 => blas::cudaDataType::CUDA_R_32F,
            ElementType::Bf16 => blas::cudaDataType::CUDA_R_16BF,
        };
        let (alpha, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        // cuBLAS is column-major, so a row-major matrix is read as its transpose: Cᵀ = Bᵀ Aᵀ.
        // SAFETY: the pointers are this device's, and the strides say how far they are read and written.
        unsafe {
            gemm_ex(
                *self.handle.handle(),
                operation(&p.b),
                operation(&p.a),
                p.columns as i32,
                p.rows as i32,
                p.depth as i32,
                (&raw const alpha).cast(),
                p.b.pointer as *const c_void,
                data_type(p.element),
                p.b.stride as i32,
                p.a.pointer as *const c_void,
                data_type(p.element),
                p.a.stride as i32,
                (&raw const beta).cast(),
                p.c as *mut c_void,
                data_type(p.c_element),
                p.c_stride as i32,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }
}

/// What an algorithm is chosen for: everything of a product but its rows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    columns: usize,
    depth: usize,
    b_transposed: bool,
    strides: [usize; 3],
    alignment: usize,
    element: ElementType,
    c_element: ElementType,
}

impl Shape {
    fn of(p: &Gemm) -> Self {
        let bytes = |stride: usize, element: ElementType| (stride * element.bytes()) as u64;
        let addresses = [p.a.pointer, p.b.pointer, p.c].into_iter().chain([
            bytes(p.a.stride, p.element),
            bytes(p.b.stride, p.element),
            bytes(p.c_stride, p.c_element),
        ]);
        let alignment = addresses.map(u64::trailing_zeros).min().unwrap_or(0);
        Self {
            columns: p.columns,
            depth: p.depth,
            b_transposed: p.b.transposed,
            strides: [p.a.stride, p.b.stride, p.c_stride],
            alignment: ALIGNMENT.min(1 << alignment.min(8)),
            element: p.element,
            c_element: p.c_element,
        }
    }
}

type Algorithm = sys::cublasLtMatmulAlgo_t;

/// Products of the rows of batches, by cuBLASLt.
pub struct RowProducts {
    handle: OnceLock<Handle>,
    /// Algorithms by shape and rows; `None` where cuBLASLt has none.
    chosen: Mutex<HashMap<(Shape, usize), Option<Algorithm>>>,
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: a handle of cuBLASLt may be used by several threads at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.0) };
    }
}

fn failed(what: &str) -> impl FnOnce(lt::CublasError) -> candle_core::Error {
    let what = what.to_string();
    move |e| candle_core::Error::Msg(format!("cuBLASLt, {what}: {e}"))
}

impl RowProducts {
    pub fn new() -> Self {
        Self { handle: OnceLock::new(), chosen: Mutex::default() }
    }

    fn handle(&self) -> Result<sys::cublasLtHandle_t> {
        if self.handle.get().is_none() {
            let handle = Handle(lt::create_handle().map_err(failed("opening it"))?);
            // Another thread may have been first; its handle stays.
            let _ = self.handle.set(handle);
        }
        Ok(self.handle.get().map_or(std::ptr::null_mut(), |h| h.0))
    }

    /// Computes a product whose `a` is not transposed; `false` if cuBLASLt cannot. While launches are captured, what has not been
    /// compared yet is computed by the algorithm for many rows.
    pub fn gemm(&self, stream: &Arc<CudaStream>, p: &Gemm, captured: bool) -> Result<bool> {
        let shape = Shape::of(p);
        let rows = ROWS.into_iter().find(|&most| p.rows <= most).unwrap_or(ROWS[ROWS.len() - 1]);
        let known = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).get(&(shape, rows)).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None if captured => self.reference(&shape)?,
            None => {
                let algorithm = self.choose(stream, p, &shape, rows)?;
                self.chosen.lock().unwrap_or_else(PoisonError::into_inner).insert((shape, rows), algorithm);
                algorithm
            }
        };
        match algorithm {
            Some(algorithm) => self.run(stream, p, &algorithm).map(|()| true),
            None => Ok(false),
        }
    }

    /// The algorithm for many rows.
    fn reference(&self, shape: &Shape) -> Result<Option<Algorithm>> {
        Ok(self.candidates(shape, ROWS[ROWS.len() - 1])?.into_iter().next())
    }

    /// The first of the algorithms for `rows` rows whose results have the bits of the algorithm for many.
    fn choose(&self, stream: &Arc<CudaStream>, p: &Gemm, shape: &Shape, rows: usize) -> Result<Option<Algorithm>> {
        let Some(reference) = self.reference(shape)? else { return Ok(None) };
        if rows == ROWS[ROWS.len() - 1] {
            return Ok(Some(reference));
        }
        let compared = COMPARED.min(rows);
        let noise = noise(compared * shape.strides[0], shape.element);
        let a = Allocated::new(stream, noise.len())?;
        let c = Allocated::new(stream, compared * shape.strides[2] * shape.c_element.bytes())?;
        // SAFETY: the memory has as many bytes; pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(a.pointer, &noise, stream.cu_stream()) }.w()?;
        let probe = Gemm { rows: compared, a: Factor { pointer: a.pointer, ..p.a }, c: c.pointer, add: false, ..*p };
        let results = |algorithm: &Algorithm| self.results(stream, &probe, algorithm);
        let wanted = results(&reference)?;
        for candidate in self.candidates(shape, rows)? {
            if candidate.data == reference.data || results(&candidate).is_ok_and(|found| found == wanted) {
                return Ok(Some(candidate));
            }
        }
        Ok(Some(reference))
    }

    /// The bytes that a product writes.
    fn results(&self, stream: &Arc<CudaStream>, p: &Gemm, algorithm: &Algorithm) -> Result<Vec<u8>> {
        let mut found = vec![0u8; p.rows * p.c_stride * p.c_element.bytes()];
        // SAFETY: both have as many bytes, and the stream is waited for before `found` is read.
        unsafe {
            result::memset_d8_async(p.c, 0, found.len(), stream.cu_stream()).w()?;
            self.run(stream, p, algorithm)?;
            result::memcpy_dtoh_async(&mut found, p.c, stream.cu_stream()).w()?;
        }
        stream.synchronize().w()?;
        Ok(found)
    }

    /// Milliseconds of each candidate for a product, and whether it has the bits of the algorithm for many rows.
    pub fn survey(
        &self,
        stream: &Arc<CudaStream>,
        p: &Gemm,
        mut time: impl FnMut(&mut dyn FnMut() -> Result<()>) -> Result<f64>,
    ) -> Result<Vec<(f64, bool)>> {
        let shape = Shape::of(p);
        let Some(reference) = self.reference(&shape)? else { bail!("cuBLASLt has no algorithm") };
        let results = |algorithm: &Algorithm| self.results(stream, p, algorithm);
        let wanted = results(&reference)?;
        let rows = ROWS.into_iter().find(|&most| p.rows <= most).unwrap_or(ROWS[ROWS.len() - 1]);
        let mut all = vec![(time(&mut || self.run(stream, p, &reference))?, true)];
        for candidate in self.candidates(&shape, rows)? {
            let Ok(found) = results(&candidate) else { continue };
            all.push((time(&mut || self.run(stream, p, &candidate))?, found == wanted));
        }
        Ok(all)
    }

    /// The algorithms that cuBLASLt expects to be fastest for `rows` rows, best first.
    fn candidates(&self, shape: &Shape, rows: usize) -> Result<Vec<Algorithm>> {
        let layouts = Layouts::new(shape, rows)?;
        let preference = Preference::new(shape.alignment as u32)?;
        // SAFETY: a value of zeros is a valid result, which the call overwrites.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: the descriptors are alive, and `found` has as many entries as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle()?,
                layouts.operation,
                layouts.b,
                layouts.a,
                layouts.c,
                layouts.c,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Ok(Vec::new());
        }
        let usable = |r: &&sys::cublasLtMatmulHeuristicResult_t| {
            r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize == 0
        };
        Ok(found[..count as usize].iter().filter(usable).map(|r| r.algo).collect())
    }

    fn run(&self, stream: &Arc<CudaStream>, p: &Gemm, algorithm: &Algorithm) -> Result<()> {
        let layouts = Layouts::new(&Shape::of(p), p.rows)?;
        let (alpha, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        // SAFETY: the pointers are this device's, and the layouts say how far they are read and written.
        unsafe {
            lt::matmul(
                self.handle()?,
                layouts.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                p.b.pointer as *const c_void,
                layouts.b,
                p.a.pointer as *const c_void,
                layouts.a,
                p.c as *const c_void,
                layouts.c,
                p.c as *mut c_void,
                layouts.c,
                algorithm,
                std::ptr::null_mut(),
                0,
                stream.cu_stream().cast(),
            )
        }
        .map_err(failed(&format!("a product of {} x {} x {}", p.rows, p.depth, p.columns)))
    }
}

/// Bytes of elements between -1 and 1 that look random.
fn noise(n: usize, element: ElementType) -> Vec<u8> {
    let value = |i: usize| {
        let mixed = (i as u32).wrapping_mul(0x9e37_79b9) ^ (i as u32 >> 7).wrapping_mul(0x85eb_ca6b);
        (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    match element {
        ElementType::F32 => (0..n).flat_map(|i| value(i).to_ne_bytes()).collect(),
        ElementType::Bf16 => (0..n).flat_map(|i| crate::gemm::round_bf16(value(i)).to_ne_bytes()).collect(),
    }
}

/// cuBLASLt's description of a product. cuBLASLt is column-major, so a row-major matrix is read as its transpose: Cᵀ = Bᵀ Aᵀ.
struct Layouts {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
}

impl Layouts {
    fn new(shape: &Shape, rows: usize) -> Result<Self> {
        let data_type = |element| match element {
            ElementType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            ElementType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let layout = |element, rows: usize, columns: usize, stride: usize| {
            lt::create_matrix_layout(data_type(element), rows as u64, columns as u64, stride as i64)
                .map_err(failed("a layout"))
        };
        let [a, b, c] = shape.strides;
        let (n, k) = (shape.columns, shape.depth);
        let operation =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let operation = operation.map_err(failed("an operation"))?;
        if shape.b_transposed {
            // `CUBLAS_OP_T`.
            let transpose = 1i32;
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            // SAFETY: the attribute is of this type.
            unsafe {
                lt::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    (&raw const transpose).cast(),
                    size_of_val(&transpose),
                )
            }
            .map_err(failed("an operation"))?;
        }
        let (b_rows, b_columns) = if shape.b_transposed { (k, n) } else { (n, k) };
        Ok(Self {
            operation,
            a: layout(shape.element, k, rows, a)?,
            b: layout(shape.element, b_rows, b_columns, b)?,
            c: layout(shape.c_element, n, rows, c)?,
        })
    }
}

impl Drop for Layouts {
    fn drop(&mut self) {
        // SAFETY: each was created once and is destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.operation);
            for layout in [self.a, self.b, self.c] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// What algorithms may do: no workspace, and no sum in parts, whose number would depend on the rows.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(alignment: u32) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(lt::create_matmul_pref().map_err(failed("a preference"))?);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the attribute has as many bytes.
            unsafe { lt::set_matmul_pref_attribute(preference.0, attribute, value, bytes) }
                .map_err(failed("a preference"))
        };
        let (workspace, none) = (0u64, 0u32);
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const none).cast(), 4)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(attribute, (&raw const alignment).cast(), 4)?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
