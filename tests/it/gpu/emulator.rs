//! A board that is no GPU: the kernels' own sources, compiled as C++ and run fiber by fiber on the CPU, over tensors of the
//! CPU. It shows that they compute what they should; what it cannot show is how they fare on a device.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{ThreadId, current};

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use libloading::Library;
use rehearsal::lm::gpu::{Board, Factor, Launch, Memory, Narrow, Product, Recorded, Source};

const HEADER: &str = include_str!("emulator.hpp");

type Run = unsafe extern "C" fn(*const u32, *const *const c_void);
type Sizes = unsafe extern "C" fn(*mut usize) -> usize;

/// Compiled sources, each loaded once. Fibers share statics, so one launch runs at a time.
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
        let name = format!("{}_{}_{}", source.file, source.narrow.name(), source.dim);
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
    // SAFETY: a library of our own, without constructors that do anything.
    unsafe { Library::new(&so) }.unwrap()
}

/// The board.
pub struct Emulator {
    libraries: Arc<Libraries>,
    /// What threads are recording.
    recording: Mutex<HashMap<ThreadId, Vec<Step>>>,
}

#[derive(Clone)]
enum Step {
    Launch(Launch),
    Product(Product),
    Copy(u64, u64, usize),
    Zero(u64, usize),
}

static TURN: Mutex<()> = Mutex::new(());

impl Emulator {
    /// Tensor cores as one step, or by the shuffles that f32 takes.
    pub fn new(shuffles: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let libraries = Libraries { folder, shuffles, loaded: Mutex::default() };
        Self { libraries: Arc::new(libraries), recording: Mutex::default() }
    }

    /// One for all tests, so that sources are compiled once.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Emulator>> = OnceLock::new();
        SHARED.get_or_init(|| Arc::new(Self::new(false))).clone()
    }

    fn do_or_record(&self, step: Step) {
        if let Some(steps) = self.recording.lock().unwrap().get_mut(&current().id()) {
            return steps.push(step);
        }
        run(&self.libraries, &step);
    }
}

fn run(libraries: &Libraries, step: &Step) {
    match step {
        Step::Launch(l) => launch(&libraries.library(l.source), l),
        Step::Product(p) => product(p),
        // SAFETY: the memory is this board's or a tensor's, and has so many bytes.
        Step::Copy(from, to, bytes) => unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) },
        // SAFETY: as above.
        Step::Zero(at, bytes) => unsafe { std::ptr::write_bytes(*at as *mut u8, 0, *bytes) },
    }
}

/// Runs a kernel of a compiled source, holding the launch against what it takes.
pub fn launch(library: &Library, l: &Launch) {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
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
        let shape = [l.grid.0, l.grid.1, l.block.0, l.block.1, l.shared];
        run(shape.as_ptr(), pointers.as_ptr());
    }
}

/// Reads a matrix, whatever its type and orientation, as `rows x columns` of f32.
fn read(f: &Factor, narrow: Narrow, rows: usize, columns: usize) -> Vec<f32> {
    let at = |i: usize| {
        // SAFETY: strides say how far the factor goes.
        unsafe {
            match narrow {
                Narrow::F32 => *(f.pointer as *const f32).add(i),
                Narrow::Bf16 => f32::from_bits(u32::from(*(f.pointer as *const u16).add(i)) << 16),
            }
        }
    };
    let place = |r: usize, c: usize| if f.turned { c * f.stride + r } else { r * f.stride + c };
    (0..rows * columns).map(|i| at(place(i / columns, i % columns))).collect()
}

fn product(p: &Product) {
    let a = read(&p.a, p.narrow, p.rows, p.depth);
    let b = read(&p.b, p.narrow, p.depth, p.columns);
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
                match p.c_type {
                    Narrow::F32 => {
                        let c = (p.c as *mut f32).add(at);
                        *c = if p.add { *c + sum } else { sum };
                    }
                    Narrow::Bf16 => *(p.c as *mut u16).add(at) = rehearsal::lm::kernels::gemm::round_bf16(sum),
                }
            }
        }
    }
}

impl Board for Emulator {
    fn allocate(&self, bytes: usize) -> Result<Memory> {
        // What nobody has written is no number.
        let memory = vec![u64::MAX; bytes.div_ceil(8).max(1)];
        Ok(Memory { pointer: memory.as_ptr() as u64, bytes, owner: Box::new(memory) })
    }

    fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        self.do_or_record(Step::Zero(pointer, bytes));
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.do_or_record(Step::Copy(from, to, bytes));
        Ok(())
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        assert!(!self.recording.lock().unwrap().contains_key(&current().id()), "an upload cannot be recorded");
        // SAFETY: the memory has so many bytes.
        unsafe { std::ptr::copy(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        assert!(!self.recording.lock().unwrap().contains_key(&current().id()), "a download cannot be recorded");
        // SAFETY: the memory has so many bytes.
        unsafe { std::ptr::copy(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.do_or_record(Step::Launch(launch.clone()));
        Ok(())
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.do_or_record(Step::Product(*product));
        Ok(())
    }

    fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((from, _)) = layout.contiguous_offsets() else { bail!("not contiguous") };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => Ok(data[from..].as_ptr() as u64),
            Storage::Cpu(CpuStorage::BF16(data)) => Ok(data[from..].as_ptr() as u64),
            _ => bail!("the emulator works on f32 and bf16 on the CPU"),
        }
    }

    fn record(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recorded>> {
        self.recording.lock().unwrap().insert(current().id(), Vec::new());
        let result = f();
        let steps = self.recording.lock().unwrap().remove(&current().id()).unwrap_or_default();
        result?;
        Ok(Box::new(Tape { libraries: self.libraries.clone(), steps }))
    }
}

struct Tape {
    libraries: Arc<Libraries>,
    steps: Vec<Step>,
}

impl Recorded for Tape {
    fn run(&self) -> Result<()> {
        self.steps.iter().for_each(|step| run(&self.libraries, step));
        Ok(())
    }
}

/// Compiles a text that stands by itself, for [`launch`].
pub fn compile_text(name: &str, text: &str, kernels: &[&str]) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let exports: String = kernels.iter().map(|k| format!("EXPORT({k})\n")).collect();
    build(folder.path(), name, &format!("{HEADER}\n{text}\n{exports}"))
}
