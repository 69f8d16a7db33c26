//! A GPU backend without a GPU: the kernels' own sources, compiled as C++ and run on the CPU over CPU tensors, one fiber
//! per GPU thread. It tests what the kernels compute, not that they run well on a device.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{ThreadId, current};

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use libloading::Library;
use rehearsal_kernels::gpu::{DeviceMemory, ElementType, Factor, Gemm, GpuBackend, Launch, LaunchGraph, Source};

const HEADER: &str = include_str!("emulator.hpp");

type Run = unsafe extern "C" fn(*const u32, *const *const c_void);
type Sizes = unsafe extern "C" fn(*mut usize) -> usize;

/// Compiled sources, each loaded once.
struct Libraries {
    folder: tempfile::TempDir,
    shuffles: bool,
    loaded: Mutex<HashMap<Source, Arc<Library>>>,
}

/// A C++ compiler, if there is one.
pub fn compiler() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&'static str>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        ["g++", "clang++", "c++"]
            .into_iter()
            .find(|c| Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success()))
    })
}

impl Libraries {
    fn library(&self, source: Source) -> Arc<Library> {
        let mut loaded = self.loaded.lock().unwrap();
        loaded.entry(source).or_insert_with(|| Arc::new(self.compile(source))).clone()
    }

    fn compile(&self, source: Source) -> Library {
        let name = format!("{}_{}_{}", source.file.name, source.element.name(), source.head_dim);
        let exports: String = source.kernels().iter().map(|k| format!("EXPORT({k})\n")).collect();
        let shuffles = if self.shuffles { "#define BY_SHUFFLES\n" } else { "" };
        let text = format!("{shuffles}{HEADER}\n{}\n{exports}", source.text());
        build(self.folder.path(), &name, &text)
    }
}

fn build(folder: &Path, name: &str, text: &str) -> Library {
    let (cpp, so): (PathBuf, PathBuf) = (folder.join(format!("{name}.cpp")), folder.join(format!("{name}.so")));
    std::fs::write(&cpp, text).unwrap();
    let output = Command::new(compiler().expect("a C++ compiler"))
        .args(["-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-ffp-contract=off", "-o"])
        .args([&so, &cpp])
        .output()
        .unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library was just built from our own sources and has no constructors.
    unsafe { Library::new(&so) }.unwrap()
}

/// The emulated GPU backend.
pub struct Emulator {
    libraries: Arc<Libraries>,
    /// Seed of the order in which the threads of a block run; 0 for the order of their numbers.
    order: u32,
    /// Operations captured so far, by the thread that captures.
    captured: Mutex<HashMap<ThreadId, Vec<Step>>>,
}

#[derive(Clone)]
enum Step {
    Launch(Launch),
    Gemm(Gemm),
    Copy(u64, u64, usize),
    Zero(u64, usize),
}

/// Bytes of dynamic shared memory that a block of a Hopper GPU has at most.
const SHARED_MOST: u32 = 227 << 10;

/// Held during a launch: fibers of a compiled source share its statics.
static LAUNCHING: Mutex<()> = Mutex::new(());

impl Emulator {
    /// A new backend. Tensor-core products are emulated as one step or, if `shuffles` is set, by the warp shuffles that
    /// f32 kernels use.
    pub fn new(shuffles: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let libraries = Libraries { folder, shuffles, loaded: Mutex::default() };
        Self { libraries: Arc::new(libraries), order: 0, captured: Mutex::default() }
    }

    /// The same backend, where the threads of a block run in an order that `order` seeds.
    pub fn ordered(&self, order: u32) -> Self {
        Self { libraries: self.libraries.clone(), order, captured: Mutex::default() }
    }

    /// An error if this thread captures: on a device it would break the capture.
    fn uncaptured(&self, what: &str) -> Result<()> {
        match self.captured.lock().unwrap().contains_key(&current().id()) {
            true => bail!("{what} cannot be captured"),
            false => Ok(()),
        }
    }

    /// The backend that tests share, so that each source is compiled once.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Emulator>> = OnceLock::new();
        SHARED.get_or_init(|| Arc::new(Self::new(false))).clone()
    }

    fn run_or_capture(&self, step: Step) {
        if let Some(steps) = self.captured.lock().unwrap().get_mut(&current().id()) {
            return steps.push(step);
        }
        run(&self.libraries, self.order, &step);
    }
}

fn run(libraries: &Libraries, order: u32, step: &Step) {
    match step {
        Step::Launch(l) => launch(&libraries.library(l.source), l, order),
        Step::Gemm(p) => gemm(p),
        // SAFETY: the memory is this backend's or a tensor's, and has `bytes` bytes.
        Step::Copy(from, to, bytes) => unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) },
        // SAFETY: as above.
        Step::Zero(at, bytes) => unsafe { std::ptr::write_bytes(*at as *mut u8, 0, *bytes) },
    }
}

/// Runs a kernel of a compiled source. Panics if the arguments are not those of the kernel, in number or size.
fn launch(library: &Library, l: &Launch, order: u32) {
    assert!(l.shared <= SHARED_MOST, "{} bytes of shared memory for {}", l.shared, l.kernel);
    let _launching = LAUNCHING.lock().unwrap_or_else(|e| e.into_inner());
    let name = l.kernel;
    // SAFETY: every kernel is exported with these signatures, and its arguments are checked against what it takes.
    unsafe {
        let sizes = library.get::<Sizes>(format!("sizes_{name}")).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut wanted = [0usize; 32];
        let n = sizes(wanted.as_mut_ptr());
        let found: Vec<usize> = l.arguments.iter().map(|a| a.0.len()).collect();
        assert_eq!(found, wanted[..n], "arguments of {name}");
        let run = library.get::<Run>(format!("launch_{name}")).unwrap();
        let pointers: Vec<*const c_void> = l.arguments.iter().map(|a| a.0.as_ptr().cast()).collect();
        let shape = [l.grid.0, l.grid.1, l.block.0, l.block.1, l.shared, order];
        run(shape.as_ptr(), pointers.as_ptr());
    }
}

/// A factor as a row-major `rows x columns` matrix of f32.
fn read(f: &Factor, element: ElementType, rows: usize, columns: usize) -> Vec<f32> {
    let at = |i: usize| {
        // SAFETY: strides say how far the factor goes.
        unsafe {
            match element {
                ElementType::F32 => *(f.pointer as *const f32).add(i),
                ElementType::Bf16 => f32::from_bits(u32::from(*(f.pointer as *const u16).add(i)) << 16),
            }
        }
    };
    let place = |r: usize, c: usize| if f.transposed { c * f.stride + r } else { r * f.stride + c };
    (0..rows * columns).map(|i| at(place(i / columns, i % columns))).collect()
}

fn gemm(p: &Gemm) {
    let a = read(&p.a, p.element, p.rows, p.depth);
    let b = read(&p.b, p.element, p.depth, p.columns);
    for i in 0..p.rows {
        let mut row = vec![0.0f32; p.columns];
        for k in 0..p.depth {
            for (sum, b) in row.iter_mut().zip(&b[k * p.columns..]) {
                *sum += a[i * p.depth + k] * b;
            }
        }
        for (j, sum) in row.into_iter().enumerate() {
            let at = i * p.c_stride + j;
            // SAFETY: the stride says how far the result goes.
            unsafe {
                match p.c_element {
                    ElementType::F32 => {
                        let c = (p.c as *mut f32).add(at);
                        *c = if p.add { *c + sum } else { sum };
                    }
                    ElementType::Bf16 => *(p.c as *mut u16).add(at) = rehearsal_kernels::gemm::round_bf16(sum),
                }
            }
        }
    }
}

impl GpuBackend for Emulator {
    fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        self.uncaptured("an allocation")?;
        // Uninitialised memory reads as NaN.
        let memory = vec![u64::MAX; bytes.div_ceil(8).max(1)];
        Ok(DeviceMemory { pointer: memory.as_ptr() as u64, bytes, owner: Box::new(memory) })
    }

    fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        self.run_or_capture(Step::Zero(pointer, bytes));
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.run_or_capture(Step::Copy(from, to, bytes));
        Ok(())
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.uncaptured("an upload")?;
        // SAFETY: the memory has as many bytes.
        unsafe { std::ptr::copy(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.uncaptured("a download")?;
        // SAFETY: the memory has as many bytes.
        unsafe { std::ptr::copy(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.run_or_capture(Step::Launch(launch.clone()));
        Ok(())
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.run_or_capture(Step::Gemm(*gemm));
        Ok(())
    }

    fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((from, _)) = layout.contiguous_offsets() else { bail!("not contiguous") };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => Ok(data[from..].as_ptr() as u64),
            Storage::Cpu(CpuStorage::BF16(data)) => Ok(data[from..].as_ptr() as u64),
            Storage::Cpu(CpuStorage::U8(data)) => Ok(data[from..].as_ptr() as u64),
            _ => bail!("the emulator works on f32, bf16 and u8 tensors on the CPU"),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.uncaptured("a wait")
    }

    fn capture(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn LaunchGraph>> {
        self.captured.lock().unwrap().insert(current().id(), Vec::new());
        let result = f();
        let steps = self.captured.lock().unwrap().remove(&current().id()).unwrap_or_default();
        result?;
        Ok(Box::new(Tape { libraries: self.libraries.clone(), order: self.order, steps }))
    }
}

struct Tape {
    libraries: Arc<Libraries>,
    order: u32,
    steps: Vec<Step>,
}

impl LaunchGraph for Tape {
    fn replay(&self) -> Result<()> {
        self.steps.iter().for_each(|step| run(&self.libraries, self.order, step));
        Ok(())
    }
}
