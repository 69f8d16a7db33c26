//! Growable buffers on a device.

use candle_core::Result;

use super::backend::{DeviceMemory, GpuBackend};
use super::source::ElementType;

/// A device buffer of elements of one type. It grows as needed and does not shrink.
pub struct Buffer {
    memory: Option<DeviceMemory>,
    len: usize,
    /// Type of the elements.
    pub element: ElementType,
}

impl Buffer {
    /// An empty buffer.
    pub fn empty(element: ElementType) -> Self {
        Self { memory: None, len: 0, element }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first element; 0 if nothing was ever allocated.
    pub fn pointer(&self) -> u64 {
        self.memory.as_ref().map_or(0, |m| m.pointer)
    }

    /// Address of the element at `index`.
    pub fn at(&self, index: usize) -> u64 {
        self.pointer() + (index * self.element.bytes()) as u64
    }

    /// Sets the number of elements; their values are lost.
    pub fn resize(&mut self, backend: &dyn GpuBackend, len: usize) -> Result<()> {
        let bytes = len * self.element.bytes();
        if self.memory.as_ref().is_none_or(|m| m.bytes < bytes) {
            self.memory = None;
            self.memory = Some(backend.allocate(bytes.next_multiple_of(256))?);
        }
        self.len = len;
        Ok(())
    }
}
