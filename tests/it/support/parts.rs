//! Real parts that some tests need and not every machine has: a browser, Prometheus, Python, models, compilers.
//!
//! A test whose part is missing is skipped, loudly. `REHEARSAL_REQUIRE` names parts that must not be missing, by commas, or
//! `all`; `REHEARSAL_SKIP` excuses some of them, each with its reason: `nvrtc=no CUDA here,models=not downloaded`.

use std::fmt::Display;
use std::io::Write as _;

/// Every part, by the name that the variables know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `prometheus` and `promtool`.
    Prometheus,
    /// Chromium with its driver.
    Chromium,
    /// Python with `transformers` and `torch`.
    Python,
    /// Python's `peft`.
    Peft,
    /// Python's `pandas` and `pyarrow`.
    Parquet,
    /// Python's `datasets` and `trl`.
    Trl,
    /// Python's `fastapi` and `uvicorn`, which `transformers serve` needs.
    Serve,
    /// A folder of real models.
    Models,
    /// The GGUF of SmolLM2-135M-Instruct.
    Smollm2,
    /// NVIDIA's runtime compiler.
    Nvrtc,
    /// A C++ compiler for the emulated GPU.
    Cxx,
    /// Rights to mount a small disk.
    Mount,
    /// `strace`, and the right to trace.
    Strace,
    /// `/dev/fuse`, and rights to mount and to hide a file of `/proc`.
    Fuse,
    /// Emulators of other processors (`qemu-x86_64`).
    Qemu,
    /// This program, built for AArch64.
    Aarch64,
    /// This program, built with the feature `mpi`, and `mpirun`.
    Mpi,
    /// Rights to make network namespaces, by `ip` and `tc`.
    Netns,
}

impl Part {
    pub const ALL: [(Self, &str); 18] = [
        (Self::Prometheus, "prometheus"),
        (Self::Chromium, "chromium"),
        (Self::Python, "python"),
        (Self::Peft, "peft"),
        (Self::Parquet, "parquet"),
        (Self::Trl, "trl"),
        (Self::Serve, "serve"),
        (Self::Models, "models"),
        (Self::Smollm2, "smollm2"),
        (Self::Nvrtc, "nvrtc"),
        (Self::Cxx, "cxx"),
        (Self::Mount, "mount"),
        (Self::Strace, "strace"),
        (Self::Fuse, "fuse"),
        (Self::Qemu, "qemu"),
        (Self::Aarch64, "aarch64"),
        (Self::Mpi, "mpi"),
        (Self::Netns, "netns"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(part, _)| *part == self).expect("every part has a name").1
    }
}

/// What the two variables say of a part that is missing.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    /// Nobody requires it.
    Optional,
    Excused(String),
    Required,
}

/// Reads the variables; an error where they name a part that there is not, or excuse one without a reason.
fn missing(name: &str, require: &str, skip: &str) -> Result<Missing, String> {
    let list = |text: &str| -> Vec<String> {
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(String::from).collect()
    };
    let known = |part: &str| match Part::ALL.iter().any(|(_, name)| *name == part) {
        true => Ok(()),
        false => Err(format!("`{part}` is no part; there are {:?}", Part::ALL.map(|(_, name)| name))),
    };
    let required = list(require);
    required.iter().filter(|part| *part != "all").try_for_each(|part| known(part))?;
    let mut excuse = None;
    for entry in list(skip) {
        let (part, reason) = entry.split_once('=').unwrap_or((&entry, ""));
        known(part.trim())?;
        if reason.trim().is_empty() {
            return Err(format!("REHEARSAL_SKIP names `{part}` without a reason; write `{part}=REASON`"));
        }
        if part.trim() == name {
            excuse = Some(reason.trim().to_string());
        }
    }
    Ok(match excuse {
        Some(reason) => Missing::Excused(reason),
        None if required.iter().any(|part| part == "all" || part == name) => Missing::Required,
        None => Missing::Optional,
    })
}

/// Says that a test, or the rest of it, is skipped for want of a part; fails where the part is required.
#[track_caller]
pub fn skip(part: Part, what: impl Display) {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let name = part.name();
    let excuse = match missing(name, &variable("REHEARSAL_REQUIRE"), &variable("REHEARSAL_SKIP")) {
        Ok(Missing::Optional) => String::new(),
        Ok(Missing::Excused(reason)) => format!(" (excused: {reason})"),
        Ok(Missing::Required) => panic!("`{name}` is required by REHEARSAL_REQUIRE: {what}"),
        Err(wrong) => panic!("{wrong}"),
    };
    // Past the test runner, which hides what passing tests print.
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {what}{excuse}");
}

#[test]
fn a_missing_part_is_optional_excused_or_required() {
    assert_eq!(missing("nvrtc", "", ""), Ok(Missing::Optional));
    assert_eq!(missing("nvrtc", "python, peft", ""), Ok(Missing::Optional));
    assert_eq!(missing("nvrtc", "python, nvrtc", ""), Ok(Missing::Required));
    assert_eq!(missing("nvrtc", "all", "python=too large"), Ok(Missing::Required));
    assert_eq!(missing("nvrtc", "all", "python=x, nvrtc=no CUDA here"), Ok(Missing::Excused("no CUDA here".into())));
    for (require, skip) in [("cuda", ""), ("", "cuda=x"), ("all", "nvrtc"), ("all", "nvrtc= ")] {
        assert!(missing("nvrtc", require, skip).is_err(), "{require:?} {skip:?}");
    }
}
