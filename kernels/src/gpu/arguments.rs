//! Values that are passed to kernels.

use super::backend::Argument;
use super::buffer::Buffer;

/// A value that can be passed to a kernel.
pub trait KernelArgument {
    /// The value's bytes, as the kernel reads them.
    fn argument(&self) -> Argument;
}

macro_rules! plain {
    ($($ty:ty),*) => {
        $(impl KernelArgument for $ty {
            fn argument(&self) -> Argument {
                Argument(self.to_ne_bytes().to_vec())
            }
        })*
    };
}
plain!(u32, i32, u64, f32);

/// A `size_t`.
impl KernelArgument for usize {
    fn argument(&self) -> Argument {
        (*self as u64).argument()
    }
}

/// The address of the first element.
impl KernelArgument for Buffer {
    fn argument(&self) -> Argument {
        self.pointer().argument()
    }
}

/// A structure that is passed by value: its fields in the order of the kernel's declaration. The caller adds what
/// padding the structure has.
#[derive(Default)]
pub struct Fields(Vec<u8>);

impl Fields {
    /// A structure without fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an `int`.
    pub fn int(mut self, x: usize) -> Self {
        self.0.extend((x as i32).to_ne_bytes());
        self
    }

    /// Appends a `float`.
    pub fn float(mut self, x: f32) -> Self {
        self.0.extend(x.to_ne_bytes());
        self
    }

    /// Appends an unsigned 32-bit integer.
    pub fn unsigned(mut self, x: u32) -> Self {
        self.0.extend(x.to_ne_bytes());
        self
    }

    /// Appends an unsigned 64-bit integer.
    pub fn wide(mut self, x: u64) -> Self {
        self.0.extend(x.to_ne_bytes());
        self
    }
}

impl KernelArgument for Fields {
    fn argument(&self) -> Argument {
        Argument(self.0.clone())
    }
}
