//! The fuzz targets on their corpora, each input as it is and a little mutated: a smoke run of `cargo fuzz`, which
//! `scripts/fuzz.sh` runs in earnest.

use std::panic::catch_unwind;
use std::path::Path;

use rehearsal::lm::random::Stream;

use crate::support::number;

#[path = "../../fuzz/targets.rs"]
mod targets;

/// Mutations of each input, unless `REHEARSAL_FUZZ` says how many.
const MUTATIONS: u64 = 40;

/// Flips, cuts, doubles or overwrites parts of an input.
fn mutated(input: &[u8], number: u64) -> Vec<u8> {
    let random = Stream::new(5, number);
    let below = |k: u64, n: usize| (random.uniform(k) * n.max(1) as f64) as usize;
    let mut bytes = input.to_vec();
    for k in 0..1 + below(0, 3) as u64 {
        let (at, len) = (below(10 * k + 1, bytes.len()), 1 + below(10 * k + 2, 16));
        let end = (at + len).min(bytes.len());
        match below(10 * k + 3, 6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << below(10 * k + 4, 8),
            1 => bytes.truncate(at),
            2 => bytes.splice(at..at, input[below(10 * k + 5, input.len())..].to_vec()).for_each(drop),
            3 => bytes[at..end].fill([0, 0x7f, 0xff][below(10 * k + 6, 3)]),
            4 => drop(bytes.drain(at..end)),
            _ => bytes[at..end].reverse(),
        }
    }
    bytes
}

#[test]
fn no_target_panics_on_its_corpus_or_near_it() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, _) in targets::TARGETS {
        let folder = corpora.join(name);
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            let input = std::fs::read(&file).unwrap();
            for number in 0..=number("REHEARSAL_FUZZ", MUTATIONS) {
                let bytes = if number == 0 { input.clone() } else { mutated(&input, number) };
                let run = catch_unwind(|| targets::run(name, &bytes));
                if run.is_err() {
                    let kept = std::env::temp_dir().join(format!("rehearsal-fuzz-{name}"));
                    std::fs::write(&kept, &bytes).unwrap();
                    panic!("{name}: mutation {number} of {}; the input is in {}", file.display(), kept.display());
                }
            }
        }
    }
}
