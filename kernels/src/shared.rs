//! A mutable buffer shared by the tasks of a parallel loop, each of which writes its own part.

use std::marker::PhantomData;

/// A mutable slice that several tasks hold at once.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: elements are accessed only through the unsafe `slice`, whose callers promise that parts do not overlap.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `data`, which stays borrowed.
    pub fn new(data: &'a mut [f32]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// The elements from `at` on.
    pub fn from(self, at: usize) -> Self {
        assert!(at <= self.len, "element {at} of {}", self.len);
        // SAFETY: just checked to be inside the buffer.
        Self { start: unsafe { self.start.add(at) }, len: self.len - at, borrow: PhantomData }
    }

    /// The elements `at .. at + len`.
    ///
    /// # Safety
    /// While the result is alive, nothing else reads or writes these elements.
    pub unsafe fn slice(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.len, "elements {at}..{} of {}", at + len, self.len);
        // SAFETY: just checked to be inside the buffer; the caller promises exclusive access.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
