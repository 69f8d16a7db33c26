//! Launches of this crate's kernels for one element type and head width.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::arguments::KernelArgument;
use super::backend::{GpuBackend, Launch};
use super::buffer::Buffer;
use super::source::{ElementType, Source, SourceFile};

/// Threads per block of kernels with one thread per element.
const THREADS: u32 = 256;

/// A backend with the element type and the head width that kernels are compiled for.
#[derive(Clone)]
pub struct Launcher {
    /// Backend that launches.
    pub backend: Arc<dyn GpuBackend>,
    /// Element type that kernels are compiled for.
    pub element: ElementType,
    /// Width of an attention head that kernels are compiled for.
    pub head_dim: usize,
}

impl Launcher {
    /// The source to compile of a file.
    pub fn source(&self, file: &'static SourceFile) -> Source {
        Source { file, element: self.element, head_dim: if file.per_head_dim { self.head_dim } else { 1 } }
    }

    /// Launches a kernel; does nothing if the grid is empty.
    pub fn run(
        &self,
        file: &'static SourceFile,
        kernel: &'static str,
        grid: (usize, usize),
        block: (u32, u32),
        shared: usize,
        arguments: &[&dyn KernelArgument],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        self.backend.launch(&Launch {
            source: self.source(file),
            kernel,
            grid: (grid.0 as u32, grid.1 as u32),
            block,
            shared: shared as u32,
            arguments: arguments.iter().map(|a| a.argument()).collect(),
        })
    }

    /// Launches a kernel with one thread for each of `n` elements.
    pub fn each(
        &self,
        file: &'static SourceFile,
        kernel: &'static str,
        n: usize,
        arguments: &[&dyn KernelArgument],
    ) -> Result<()> {
        self.run(file, kernel, (n.div_ceil(THREADS as usize), 1), (THREADS, 1), 0, arguments)
    }

    /// Launches a kernel with one block of `threads` threads for each of `rows` rows.
    pub fn rows(
        &self,
        file: &'static SourceFile,
        kernel: &'static str,
        rows: usize,
        threads: u32,
        arguments: &[&dyn KernelArgument],
    ) -> Result<()> {
        self.run(file, kernel, (rows, 1), (threads, 1), 0, arguments)
    }

    /// Copies integers to a new buffer.
    pub fn upload(&self, data: &[u32]) -> Result<Buffer> {
        self.bytes(bytemuck::cast_slice(data), data.len())
    }

    /// Copies floats to a new buffer.
    pub fn upload_floats(&self, data: &[f32]) -> Result<Buffer> {
        self.bytes(bytemuck::cast_slice(data), data.len())
    }

    fn bytes(&self, data: &[u8], len: usize) -> Result<Buffer> {
        let mut buffer = Buffer::empty(ElementType::F32);
        buffer.resize(&*self.backend, len)?;
        if !data.is_empty() {
            self.backend.upload(data, buffer.pointer())?;
        }
        Ok(buffer)
    }

    /// Address of a tensor's first element.
    pub fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        self.backend.tensor(tensor)
    }
}
