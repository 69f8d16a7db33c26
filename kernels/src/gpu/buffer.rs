//! Rows on a board.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::board::{Argument, Board, Launch, Memory, Narrow, Source};

/// A buffer of numbers of one type, that grows as it has to.
pub struct Buffer {
    memory: Option<Memory>,
    len: usize,
    pub narrow: Narrow,
}

impl Buffer {
    /// Nothing yet.
    pub fn empty(narrow: Narrow) -> Self {
        Self { memory: None, len: 0, narrow }
    }

    /// Numbers that are held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where they begin.
    pub fn pointer(&self) -> u64 {
        self.memory.as_ref().map_or(0, |m| m.pointer)
    }

    /// Makes room for `len` numbers; what was there is lost.
    pub fn resize(&mut self, board: &dyn Board, len: usize) -> Result<()> {
        let bytes = len * self.narrow.bytes();
        if self.memory.as_ref().is_none_or(|m| m.bytes < bytes) {
            self.memory = None;
            self.memory = Some(board.allocate(bytes.next_multiple_of(256))?);
        }
        self.len = len;
        Ok(())
    }
}

/// Arguments of kernels.
pub trait Pass {
    fn pass(&self) -> Argument;
}

macro_rules! plain {
    ($($ty:ty),*) => {
        $(impl Pass for $ty {
            fn pass(&self) -> Argument {
                Argument(self.to_ne_bytes().to_vec())
            }
        })*
    };
}
plain!(u32, i32, u64, f32);

impl Pass for usize {
    fn pass(&self) -> Argument {
        (*self as u64).pass()
    }
}

impl Pass for Buffer {
    fn pass(&self) -> Argument {
        self.pointer().pass()
    }
}

/// A structure of four-byte fields in the order of the kernel's.
pub struct Fields(Vec<u8>);

impl Fields {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    pub fn int(mut self, x: usize) -> Self {
        self.0.extend((x as i32).to_ne_bytes());
        self
    }

    pub fn float(mut self, x: f32) -> Self {
        self.0.extend(x.to_ne_bytes());
        self
    }

    pub fn wide(mut self, x: u64) -> Self {
        self.0.extend(x.to_ne_bytes());
        self
    }
}

impl Pass for Fields {
    fn pass(&self) -> Argument {
        Argument(self.0.clone())
    }
}

/// A board with a model's type of rows and width of heads: what kernels are launched through.
#[derive(Clone)]
pub struct Launcher {
    pub board: Arc<dyn Board>,
    pub narrow: Narrow,
    pub dim: usize,
}

/// Threads of a block where every thread has one number.
const THREADS: u32 = 256;

impl Launcher {
    /// The same board for other rows.
    pub fn source(&self, file: &'static str) -> Source {
        let dim = if matches!(file, "attention" | "decode") { self.dim } else { 1 };
        Source { file, narrow: self.narrow, dim }
    }

    /// Runs a kernel; nothing for an empty grid.
    pub fn run(
        &self,
        file: &'static str,
        kernel: &'static str,
        grid: (usize, usize),
        block: (u32, u32),
        shared: usize,
        arguments: &[&dyn Pass],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        self.board.launch(&Launch {
            source: self.source(file),
            kernel,
            grid: (grid.0 as u32, grid.1 as u32),
            block,
            shared: shared as u32,
            arguments: arguments.iter().map(|a| a.pass()).collect(),
        })
    }

    /// A kernel with a thread for each of `n` numbers.
    pub fn each(&self, file: &'static str, kernel: &'static str, n: usize, arguments: &[&dyn Pass]) -> Result<()> {
        self.run(file, kernel, (n.div_ceil(THREADS as usize), 1), (THREADS, 1), 0, arguments)
    }

    /// A kernel with a block for each of `rows` rows.
    pub fn rows(
        &self,
        file: &'static str,
        kernel: &'static str,
        rows: usize,
        threads: u32,
        arguments: &[&dyn Pass],
    ) -> Result<()> {
        self.run(file, kernel, (rows, 1), (threads, 1), 0, arguments)
    }

    /// Whole numbers on the device.
    pub fn upload(&self, data: &[u32]) -> Result<Buffer> {
        self.bytes(bytemuck::cast_slice(data), data.len())
    }

    /// Numbers on the device.
    pub fn upload_floats(&self, data: &[f32]) -> Result<Buffer> {
        self.bytes(bytemuck::cast_slice(data), data.len())
    }

    fn bytes(&self, data: &[u8], len: usize) -> Result<Buffer> {
        let mut buffer = Buffer::empty(Narrow::F32);
        buffer.resize(&*self.board, len)?;
        if !data.is_empty() {
            self.board.upload(data, buffer.pointer())?;
        }
        Ok(buffer)
    }

    /// Where a tensor begins, as an argument.
    pub fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        self.board.tensor(tensor)
    }
}
