//! Global allocator of the command: glibc's heap, in huge pages, without returning memory to the system.
//!
//! Every training step allocates and frees the same large buffers. Memory that is returned to the system costs a page
//! fault for each 4 KiB page when it is used again, and small pages cost TLB misses.

use std::alloc::{GlobalAlloc, Layout, System};

#[global_allocator]
static HEAP: Heap = Heap;

/// glibc's heap; large allocations are backed by transparent huge pages.
struct Heap;

/// Size of a huge page, in bytes.
const HUGE: usize = 2 << 20;
/// Smallest allocation that asks for huge pages, in bytes.
const LARGE: usize = 1 << 20;

// SAFETY: all memory comes from `System`; `madvise` with `MADV_HUGEPAGE` does not change its content.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        advise_huge_pages(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() < LARGE {
            // SAFETY: the caller upholds the contract of `GlobalAlloc`.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // `madvise` must come before the first write, which maps a small page otherwise. SAFETY: the caller upholds the
        // contract of `GlobalAlloc`; `start` is valid for `size` bytes unless it is null.
        unsafe {
            let start = self.alloc(layout);
            if !start.is_null() {
                start.write_bytes(0, layout.size());
            }
            start
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        advise_huge_pages(unsafe { System.realloc(start, layout, size) }, size)
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.dealloc(start, layout) }
    }
}

/// Bytes by which glibc grows the heap beyond each request (`M_TOP_PAD`).
const GROWTH: usize = 256 << 20;

/// Asks for huge pages for a large allocation and returns `start`.
///
/// The range is widened to whole huge pages and by [`GROWTH`]: glibc writes the header of the free rest of the heap
/// behind the allocation, and a region in which one byte was written has small pages already.
fn advise_huge_pages(start: *mut u8, size: usize) -> *mut u8 {
    if size >= LARGE && !start.is_null() {
        let offset = start.addr() % HUGE;
        let length = (offset + size + GROWTH).next_multiple_of(HUGE);
        // SAFETY: `MADV_HUGEPAGE` is a hint that is valid for any range; unmapped pages are skipped, and a failure has
        // no effect.
        unsafe { libc::madvise(start.wrapping_sub(offset).cast(), length, libc::MADV_HUGEPAGE) };
    }
    start
}

/// Configures glibc to allocate everything from one heap (no arenas, no `mmap`) and never to shrink it.
pub fn configure() {
    // SAFETY: `mallopt` is called before any other thread is started. A failure leaves the default, which is valid.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, GROWTH as libc::c_int);
    }
}
