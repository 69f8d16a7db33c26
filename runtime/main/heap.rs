//! The command's memory: glibc's heap, kept and in huge pages. Every step takes and frees the same large buffers, and every
//! 4 KiB page of them costs a fault when it is first touched and an address translation ever after.

use std::alloc::{GlobalAlloc, Layout, System};

#[global_allocator]
static HEAP: Heap = Heap;

/// glibc's heap, with huge pages under large buffers.
struct Heap;

/// Size of a huge page.
const HUGE: usize = 2 << 20;
/// Buffers from this size on ask for huge pages.
const LARGE: usize = 1 << 20;

// SAFETY: memory comes from `System` as it is; the advice changes no byte of it.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        advised(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() < LARGE {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // Advice comes before the first touch.
        // SAFETY: the caller's promise; zeros go where there is memory.
        unsafe {
            let start = self.alloc(layout);
            if !start.is_null() {
                start.write_bytes(0, layout.size());
            }
            start
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        advised(unsafe { System.realloc(start, layout, size) }, size)
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

/// What the heap grows by beyond what it is asked for.
const GROWTH: usize = 256 << 20;

/// Asks for huge pages under a large buffer, under the ends that it shares with its neighbours, and under what will come to lie
/// behind it: glibc notes the rest of the heap there, and a region where a byte was written has small pages already.
fn advised(start: *mut u8, size: usize) -> *mut u8 {
    if size >= LARGE && !start.is_null() {
        let offset = start.addr() % HUGE;
        let length = (offset + size + GROWTH).next_multiple_of(HUGE);
        // SAFETY: advice about pages, which may be given for any range; what is not mapped is passed over. A refusal changes
        // nothing.
        unsafe { libc::madvise(start.wrapping_sub(offset).cast(), length, libc::MADV_HUGEPAGE) };
    }
    start
}

/// Asks glibc to take all memory from one growing heap and to keep what is freed.
pub fn keep() {
    // SAFETY: `mallopt` may be called at any time; no other thread runs yet. A refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, GROWTH as libc::c_int);
    }
}
