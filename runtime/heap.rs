//! Memory that the C library keeps when jobs end.

/// Makes glibc serve all threads from one heap, for a process that runs many jobs one after the other: by default each
/// thread has a heap of its own, and what a job freed on its threads stays reserved there. Call it once, before threads
/// start; it is the same as starting the process with `MALLOC_ARENA_MAX=1`. Does nothing where the C library is another
/// or the program brings its own allocator. A library should leave it to its program.
///
/// `docs/embedding.md` has figures.
pub fn use_one_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt may be called at any time; it changes how later allocations are made.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Returns free memory of the C library to the system. Blocking, for milliseconds.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
