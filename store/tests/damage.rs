//! Damage of the database's files: whatever is lost is told, and what lies beside the database is not lost.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rehearsal_store::{ModelCounters, Preference, Prompt, Repair, Store, TensorBytes};

const RECORDS: u64 = 3000;

/// A generator of numbers, so that a case is repeated by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn weights(step: u64) -> Vec<u8> {
    (0..50_000u64).flat_map(|i| ((i * step) as f32).to_le_bytes()).collect()
}

/// A store with checkpoints of steps 20 and 30 and a ledger.
fn fill(directory: &Path) {
    let (mut store, _) = Store::open(directory).unwrap();
    let models = BTreeMap::from([("policy".to_string(), ModelCounters::default())]);
    for step in 0..RECORDS / 20 {
        let preference = |index: u32| Preference {
            step,
            index,
            prompt: Prompt::Text(format!("question {step}")),
            completions: vec![format!("answer {step} ").repeat(20), "another".into()],
            scores: vec![1.0, 0.0],
            pair: Some((0, 1)),
            judge: "anna".into(),
            ..Preference::default()
        };
        store.log_preferences(&(0..20).map(preference).collect::<Vec<_>>()).unwrap();
        if step % 50 == 30 {
            let data = weights(step);
            let tensor = TensorBytes { name: "w".into(), dtype: "F32", shape: vec![50_000], data: &data };
            store.save_checkpoint(step, &models, &[tensor], b"state", 2).unwrap();
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to)
        } else {
            fs::copy(entry.path(), to).map(|_| ()).unwrap()
        }
    }
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

/// Damages one file beside the shards, and says how.
fn damage(directory: &Path, random: &mut Random) -> String {
    let mut all = Vec::new();
    files(&directory.join("store"), &mut all);
    all.extend(["store.base", "store.journal", "store.sentinel"].map(|name| directory.join(name)));
    all.sort();
    // Most bytes are the log's, and so is most damage.
    let log = directory.join("store/db");
    let path = if random.below(2) == 0 { log } else { all[random.below(all.len() as u64) as usize].clone() };
    let mut bytes = fs::read(&path).unwrap();
    if bytes.is_empty() {
        return format!("{} is empty", path.display());
    }
    // The log is allocated ahead of what is written.
    let written = bytes.iter().rposition(|b| *b != 0).unwrap_or(0) + 1;
    let at = random.below(written as u64) as usize;
    let what = match random.below(3) {
        0 => {
            bytes[at] ^= 1 << random.below(8);
            "flipped a bit"
        }
        1 => {
            let end = bytes.len().min(at + 4096);
            bytes[at..end].fill(0);
            "zeroed a page"
        }
        _ => {
            bytes.truncate(at);
            "cut it off"
        }
    };
    fs::write(&path, bytes).unwrap();
    format!("{} at {at}: {what}", path.display())
}

/// What a damaged store holds.
struct Found {
    records: u64,
    told: Vec<String>,
}

fn open(directory: &Path, case: &str) -> Found {
    let (mut store, repairs) = Store::open(directory).unwrap_or_else(|e| panic!("{case}: {e}"));
    let mut told: Vec<String> = repairs.into_iter().map(|Repair(message)| message).collect();
    let (latest, notes) = store.latest_checkpoint().unwrap_or_else(|e| panic!("{case}: {e}"));
    told.extend(notes.into_iter().map(|n| n.0));
    let latest = latest.unwrap_or_else(|| panic!("{case}: no checkpoint, though its files are whole"));
    assert_eq!(latest.step, 130, "{case}");
    assert!(latest.tensors[0].data == weights(130), "{case}: the weights differ");
    let mut records = 0;
    for preference in store.preferences().unwrap_or_else(|e| panic!("{case}: {e}")) {
        match preference {
            Ok(preference) => {
                let step = preference.step;
                assert_eq!(preference.prompt, Prompt::Text(format!("question {step}")), "{case}");
                records += 1;
            }
            Err(e) => told.push(e.to_string()),
        }
    }
    told.extend(store.verify().unwrap_or_else(|e| panic!("{case}: {e}")).0);
    told.extend(store.repairs().into_iter().map(|r| r.0));
    // The store can be worked with.
    store.put_job("after", &1u8).unwrap_or_else(|e| panic!("{case}: {e}"));
    Found { records, told }
}

/// `REHEARSAL_DAMAGE=N` tries N cases.
#[test]
fn damage_of_the_database_loses_only_what_is_damaged_and_is_told() {
    let cases: u64 = std::env::var("REHEARSAL_DAMAGE").ok().map_or(60, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    fill(&whole);
    let (mut intact, mut kept, mut silent) = (0, 0, Vec::new());
    for seed in 0..cases {
        let directory = folder.path().join(format!("case {seed}"));
        copy(&whole, &directory);
        let mut random = Random(seed);
        let mut case = format!("seed {seed}, {}", damage(&directory, &mut random));
        let twice = seed % 4 == 3;
        if twice {
            case = format!("{case}; {}", damage(&directory, &mut random));
        }
        let found = open(&directory, &case);
        assert!(twice || found.records == RECORDS, "{case}: {} of {RECORDS} records", found.records);
        kept += found.records;
        intact += u64::from(found.records == RECORDS);
        if found.records < RECORDS && found.told.is_empty() {
            silent.push(format!("{case}: {} of {RECORDS} records", found.records));
        }
        println!("{case}: {} records; {:?}", found.records, found.told.first());
        // Opened once more, it is whole.
        let again = open(&directory, &case);
        assert_eq!(again.records, found.records, "{case}");
        fs::remove_dir_all(&directory).unwrap();
    }
    println!(
        "{cases} cases: {intact} without loss, {:.1} % of records kept",
        100.0 * kept as f64 / (cases * RECORDS) as f64
    );
    assert!(silent.is_empty(), "lost without a word:\n{}", silent.join("\n"));
}
