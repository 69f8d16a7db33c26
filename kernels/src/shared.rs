//! A buffer that tasks of one computation fill together, each its own part.

use std::marker::PhantomData;

/// A mutable slice, handed to several tasks at once.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    start: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: parts are taken by the unsafe `slice` alone, whose callers promise that parts do not overlap.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// The whole of `data`, which stays borrowed.
    pub fn new(data: &'a mut [f32]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// The buffer from an element on.
    pub fn from(self, at: usize) -> Self {
        assert!(at <= self.len, "element {at} of {}", self.len);
        // SAFETY: inside the buffer, as was just checked.
        Self { start: unsafe { self.start.add(at) }, len: self.len - at, life: PhantomData }
    }

    /// A part of the buffer.
    ///
    /// # Safety
    /// While the result lives, nobody else reads or writes this part.
    pub unsafe fn slice(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.len, "elements {at}..{} of {}", at + len, self.len);
        // SAFETY: inside the buffer, as was just checked; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
