//! Three steps on emulated processors give the bits of this one: `docs/determinism.md` says what is promised.

use std::path::Path;
use std::process::Command;

use crate::support::parts::{Part, skip};
use crate::support::{program, stderr};

/// A job of three steps.
fn job(directory: &Path, more: &str) -> String {
    format!(
        "[job]\ndirectory = \"{}\"\nsteps = 3\nseed = 11\n[rollout]\nprompts_per_step = 2\ncompletions_per_prompt = 2\n\
         max_new_tokens = 8\n[reward]\nrules = [\"distinct_words\"]\n[optimizer]\nlearning_rate = 1e-3\n{more}",
        directory.display()
    )
}

/// Runs the job with a command; the trained weights.
fn weights(mut command: Command, folder: &Path, name: &str, more: &str) -> Vec<u8> {
    let (file, directory) = (folder.join(format!("{name}.toml")), folder.join(name));
    std::fs::write(&file, job(&directory, more)).unwrap();
    let output = command.args(["run", file.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{name}: {}", stderr(&output));
    std::fs::read(directory.join("model/model.safetensors")).unwrap()
}

/// This program on an emulated processor.
fn emulated(emulator: &str, arguments: &[&str], path: &Path) -> Option<Command> {
    if Command::new(emulator).arg("--version").output().is_err() {
        skip(Part::Qemu, format_args!("there is no {emulator}; `apt-get install qemu-user` brings it"));
        return None;
    }
    let mut command = Command::new(emulator);
    command.args(arguments).arg(path);
    Some(command)
}

const BF16: &str = "moments = \"bf16\"\n[model]\ndtype = \"bf16\"\n";

#[test]
#[cfg(target_arch = "x86_64")]
fn older_processors_compute_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    // AVX2 without AVX-512; neither; and products of bf16 without AVX-512-BF16.
    for (more, models) in [("", ["Haswell", "Nehalem"].as_slice()), (BF16, &["Haswell"])] {
        let name = |model: &str| format!("{model}-{}", more.len());
        let native = weights(program(), folder.path(), &name("native"), more);
        for model in models {
            let path = Path::new(program().get_program()).to_path_buf();
            let Some(command) = emulated("qemu-x86_64", &["-cpu", model], &path) else { return };
            let there = weights(command, folder.path(), &name(model), more);
            assert!(there == native, "{model} computes other bits ({more:?})");
        }
    }
}

#[test]
fn aarch64_computes_the_same_bits() {
    let Some(path) = std::env::var_os("REHEARSAL_AARCH64") else {
        return skip(Part::Aarch64, "REHEARSAL_AARCH64 names no program that is built for AArch64");
    };
    let folder = tempfile::tempdir().unwrap();
    let sysroot = ["-L", "/usr/aarch64-linux-gnu"];
    let Some(command) = emulated("qemu-aarch64", &sysroot, Path::new(&path)) else { return };
    let there = weights(command, folder.path(), "aarch64", "");
    assert!(there == weights(program(), folder.path(), "native", ""), "AArch64 computes other bits");
}
