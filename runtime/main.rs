//! The `rehearsal` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    keep_memory();
    rehearsal::cli::main()
}

/// Asks glibc to keep freed memory for the next step: each step frees and takes the same large buffers, and giving
/// them back to the system in between costs a page fault for every 4 KiB.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory() {
    // SAFETY: `mallopt` may be called at any time; no other thread runs yet. A refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory() {}
