//! What a GPU does for us, and nothing more: memory, launches, matrix products, and sequences of them that can be repeated.

use std::any::Any;

use candle_core::{Result, Tensor};

/// Memory of a board; freed, in the order of its stream, when it is dropped.
pub struct Memory {
    pub pointer: u64,
    pub bytes: usize,
    /// Whoever frees it.
    pub owner: Box<dyn Any + Send + Sync>,
}

/// One argument of a kernel, as its bytes lie in memory.
#[derive(Debug, Clone)]
pub struct Argument(pub Vec<u8>);

/// A launch.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Which source the kernel is in; see [`Source`].
    pub source: Source,
    pub kernel: &'static str,
    pub grid: (u32, u32),
    pub block: (u32, u32),
    /// Bytes of memory that the threads of a block share beyond what the kernel declares.
    pub shared: u32,
    pub arguments: Vec<Argument>,
}

/// What the products read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Narrow {
    F32,
    Bf16,
}

impl Narrow {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Its name in a kernel's source.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::Bf16 => "bf16",
        }
    }
}

/// A file of kernels, for one type of rows and one width of heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    pub file: &'static str,
    pub narrow: Narrow,
    /// Width of a head; 1 where the file does not ask.
    pub dim: usize,
}

const COMMON: &str = include_str!("kernels/common.cuh");

/// The files and their texts.
pub const FILES: [(&str, &str); 5] = [
    ("rows", include_str!("kernels/rows.cu")),
    ("head", include_str!("kernels/head.cu")),
    ("attention", include_str!("kernels/attention.cu")),
    ("decode", include_str!("kernels/decode.cu")),
    ("sample", include_str!("kernels/sample.cu")),
];

impl Source {
    /// The text, ready to be compiled.
    pub fn text(&self) -> String {
        let body = FILES.iter().find(|(name, _)| *name == self.file).map_or("", |(_, text)| text);
        format!("#define NARROW {}\n#define DIM {}\n{COMMON}\n{body}", self.narrow.name(), self.dim)
    }

    /// What NVRTC is told, for `compute_80` and the like.
    pub fn options(&self, architecture: &str) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_string()];
        if self.file == "sample" {
            // Its blocks have 1,024 threads, which share the registers of a multiprocessor.
            options.push("--maxrregcount=64".to_string());
        }
        options
    }

    /// Names of the file's kernels.
    pub fn kernels(&self) -> Vec<String> {
        let text = self.text();
        let names = text.split("\nKERNEL ").skip(1).filter_map(|rest| rest.split('(').next());
        names.map(|name| name.trim().to_string()).collect()
    }
}

/// A matrix that a product reads, row-major: element `(r, c)` at `pointer + (r * stride + c) * bytes`, or turned.
#[derive(Debug, Clone, Copy)]
pub struct Factor {
    pub pointer: u64,
    pub stride: usize,
    pub turned: bool,
}

/// `c = a · b`, or `c += a · b`, with f32 sums: `a` `[rows, depth]` and `b` `[depth, columns]` narrow, `c` narrow or f32.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub rows: usize,
    pub depth: usize,
    pub columns: usize,
    pub narrow: Narrow,
    pub a: Factor,
    pub b: Factor,
    pub c: u64,
    pub c_stride: usize,
    pub c_type: Narrow,
    pub add: bool,
}

/// A device with one stream: everything happens in the order in which it is asked for.
pub trait Board: Send + Sync {
    /// Memory with anything in it.
    fn allocate(&self, bytes: usize) -> Result<Memory>;
    fn zero(&self, pointer: u64, bytes: usize) -> Result<()>;
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    fn upload(&self, from: &[u8], to: u64) -> Result<()>;
    /// Waits for everything before.
    fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    fn launch(&self, launch: &Launch) -> Result<()>;
    fn product(&self, product: &Product) -> Result<()>;
    /// Where a contiguous tensor of this device begins. Whoever writes there holds the tensor alone.
    fn tensor(&self, tensor: &Tensor) -> Result<u64>;
    /// Records what `f` launches, without running it, to be run again and again. `f` allocates nothing and copies nothing
    /// to or from the host.
    fn record(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recorded>>;
}

/// A recorded sequence of launches.
pub trait Recorded: Send {
    fn run(&self) -> Result<()>;
}
