//! What a GPU provides: memory, launches, matrix products, and sequences of launches that are captured and replayed.

use std::any::Any;

use candle_core::{Result, Tensor};

use super::source::{ElementType, Source};

/// Memory on a device. Dropping it frees the memory in stream order.
pub struct DeviceMemory {
    /// Address on the device.
    pub pointer: u64,
    /// Size in bytes.
    pub bytes: usize,
    /// The value whose destructor frees the memory.
    pub owner: Box<dyn Any + Send + Sync>,
}

/// One argument of a kernel: its bytes, as the kernel reads them.
#[derive(Debug, Clone)]
pub struct Argument(pub Vec<u8>);

/// A kernel launch.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The compiled source that has the kernel.
    pub source: Source,
    /// Name of the kernel in the source.
    pub kernel: &'static str,
    /// Blocks along x and y.
    pub grid: (u32, u32),
    /// Threads of a block along x and y.
    pub block: (u32, u32),
    /// Bytes of dynamic shared memory per block.
    pub shared: u32,
    /// Arguments in the kernel's order.
    pub arguments: Vec<Argument>,
}

/// A factor of a [`Gemm`]: element `(r, c)` is at `pointer + (r * stride + c) * bytes`, or, if transposed, at
/// `pointer + (c * stride + r) * bytes`.
#[derive(Debug, Clone, Copy)]
pub struct Factor {
    /// Address of the first element on the device.
    pub pointer: u64,
    /// Elements from one row in memory to the next.
    pub stride: usize,
    /// Whether the factor is the transpose of what is in memory.
    pub transposed: bool,
}

/// A matrix product `c = a · b`, or `c += a · b` if `add` is set, with f32 sums.
///
/// `a` is `[rows, depth]` and `b` is `[depth, columns]`, both of type `element`; `c` is `[rows, columns]` of type
/// `c_element`, its rows `c_stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of `a` and `c`.
    pub rows: usize,
    /// Columns of `a` and rows of `b`: the summed index.
    pub depth: usize,
    /// Columns of `b` and `c`.
    pub columns: usize,
    /// Type of the factors' elements.
    pub element: ElementType,
    /// Left factor, `[rows, depth]`.
    pub a: Factor,
    /// Right factor, `[depth, columns]`.
    pub b: Factor,
    /// Address of the result on the device.
    pub c: u64,
    /// Elements from one row of the result to the next.
    pub c_stride: usize,
    /// Type of the result's elements.
    pub c_element: ElementType,
    /// Whether the product is added to what `c` holds.
    pub add: bool,
}

/// A GPU with one stream: operations run in the order of the calls.
pub trait GpuBackend: Send + Sync {
    /// Allocates memory, which is not initialised.
    fn allocate(&self, bytes: usize) -> Result<DeviceMemory>;
    /// Sets bytes to zero.
    fn zero(&self, pointer: u64, bytes: usize) -> Result<()>;
    /// Copies bytes on the device.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Copies bytes from the host to the device.
    fn upload(&self, from: &[u8], to: u64) -> Result<()>;
    /// Copies bytes from the device to the host, after all earlier operations.
    fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Launches a kernel, whose source is compiled if this is its first launch.
    fn launch(&self, launch: &Launch) -> Result<()>;
    /// Computes a matrix product.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;
    /// The address of the first element of a contiguous tensor on this device. The caller may write there only if nothing
    /// else uses the tensor.
    fn tensor(&self, tensor: &Tensor) -> Result<u64>;
    /// Waits for all operations asked for so far.
    fn synchronize(&self) -> Result<()>;
    /// Captures the operations that `f` asks for, without running them, to be replayed. `f` must not allocate, and must
    /// not copy to or from the host.
    fn capture(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn LaunchGraph>>;
    /// Milliseconds of a product by each algorithm that was considered for it, the chosen for many rows first, and whether
    /// its results have that one's bits. `c` is overwritten.
    fn survey(&self, _: &Gemm) -> Result<Vec<(f64, bool)>> {
        Ok(Vec::new())
    }
}

/// A captured sequence of operations.
pub trait LaunchGraph: Send {
    /// Runs the sequence once.
    fn replay(&self) -> Result<()>;
}
