//! Sources of GPU kernels, and how they are compiled.

use std::hash::{Hash, Hasher};

/// Type of the elements that products read and write on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The type's name in a kernel's source.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::Bf16 => "bf16",
        }
    }
}

/// A file of CUDA kernels. It is compiled after `common.cuh`, once for each element type and head width it is used with.
#[derive(Debug)]
pub struct SourceFile {
    /// Name in error messages; unique among all files.
    pub name: &'static str,
    /// CUDA C++ without the common part.
    pub text: &'static str,
    /// The kernels are compiled for one width of attention heads.
    pub per_head_dim: bool,
    /// Registers that a thread may use at most.
    pub registers_max: Option<u32>,
}

impl SourceFile {
    /// A file that does not depend on the width of heads.
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, per_head_dim: false, registers_max: None }
    }

    const fn per_head_dim(name: &'static str, text: &'static str) -> Self {
        Self { per_head_dim: true, ..Self::new(name, text) }
    }
}

const COMMON: &str = include_str!("sources/common.cuh");

/// Norms, rotary positions, activations, embeddings, and sums over rows.
pub static ROWS: SourceFile = SourceFile::new("rows", include_str!("sources/rows.cu"));
/// Log-probabilities and scores from the last hidden states.
pub static HEAD: SourceFile = SourceFile::new("head", include_str!("sources/head.cu"));
/// Attention over packed sequences, forward and backward.
pub static ATTENTION: SourceFile = SourceFile::per_head_dim("attention", include_str!("sources/attention.cu"));
/// Attention of generated tokens against the KV cache.
pub static DECODE: SourceFile = SourceFile::per_head_dim("decode", include_str!("sources/decode.cu"));
/// Sampling of tokens.
pub static SAMPLE: SourceFile = SourceFile {
    // A block of 1,024 threads shares the 65,536 registers of a multiprocessor.
    registers_max: Some(64),
    ..SourceFile::new("sample", include_str!("sources/sample.cu"))
};

/// All files of this crate.
pub static FILES: [&SourceFile; 5] = [&ROWS, &HEAD, &ATTENTION, &DECODE, &SAMPLE];

/// A [`SourceFile`] for one element type and one width of heads: the unit of compilation.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// File that is compiled.
    pub file: &'static SourceFile,
    /// Element type that it is compiled for.
    pub element: ElementType,
    /// Width of a head; 1 where the file does not depend on it.
    pub head_dim: usize,
}

impl Source {
    fn key(&self) -> (&'static str, ElementType, usize) {
        (self.file.name, self.element, self.head_dim)
    }

    /// The text to compile.
    pub fn text(&self) -> String {
        let (element, dim, text) = (self.element.name(), self.head_dim, self.file.text);
        format!("#define NARROW {element}\n#define DIM {dim}\n{COMMON}\n{text}")
    }

    /// Options of NVRTC for an architecture such as `compute_80`.
    pub fn options(&self, architecture: &str) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_string()];
        options.extend(self.file.registers_max.map(|max| format!("--maxrregcount={max}")));
        options
    }

    /// Names of the file's kernels.
    pub fn kernels(&self) -> Vec<String> {
        let text = self.text();
        let names = text.split("\nKERNEL ").skip(1).filter_map(|rest| rest.split('(').next());
        names.map(|name| name.trim().to_string()).collect()
    }
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Source {}

impl Hash for Source {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}
