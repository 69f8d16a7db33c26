//! The `rehearsal` command.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "main/heap.rs"]
mod heap;

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    heap::configure();
    rehearsal::cli::main()
}
