//! Queries the preference ledger of a job: which completions were preferred, by what margin, at which policy version.
//!
//!     cargo run -- run examples/quickstart.toml
//!     cargo run --example query_ledger -- runs/quickstart

use std::collections::BTreeMap;
use std::path::PathBuf;

use rehearsal::store::{Preference, Prompt, Store};

fn text(prompt: &Prompt) -> &str {
    match prompt {
        Prompt::Text(text) => text,
        Prompt::Conversation(turns) => turns.last().map_or("", |t| &t.content),
    }
}

fn show(p: &Preference) {
    println!("\n{}   (step {}, policy version {})", text(&p.prompt), p.step, p.policy_version);
    for (i, completion) in p.completions.iter().enumerate() {
        let mark = match p.pair {
            Some((won, _)) if won as usize == i => "won ",
            Some((_, lost)) if lost as usize == i => "lost",
            _ => "    ",
        };
        println!("  {mark} {:7.3}  {completion}   [{}]", p.scores[i], p.reasons[i]);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "runs/quickstart".into()));
    if !Store::exists(&directory) {
        return Err(format!("{} holds no job; run one first", directory.display()).into());
    }
    let (store, _) = Store::open(&directory)?;

    // Mean margin by policy version.
    let mut by_version: BTreeMap<u64, (u32, u32, f64)> = BTreeMap::new();
    let mut largest: Option<Preference> = None;
    for preference in store.preferences()? {
        let preference = preference?;
        let (pairs, ties, margin) = by_version.entry(preference.policy_version / 10 * 10).or_default();
        *pairs += u32::from(preference.pair.is_some());
        *ties += u32::from(preference.pair.is_none());
        *margin += preference.margin();
        if largest.as_ref().is_none_or(|l| preference.margin() > l.margin()) {
            largest = Some(preference);
        }
    }
    println!("policy versions   pairs   ties   mean margin");
    for (version, (pairs, ties, margin)) in &by_version {
        println!(
            "{version:4} to {:4}     {pairs:5}  {ties:5}   {:11.3}",
            version + 9,
            margin / f64::from((*pairs).max(1))
        );
    }

    // The preference with the largest margin, and all others on its prompt.
    if let Some(largest) = largest {
        println!("\nThe preference with the largest margin, and all others on its prompt:");
        for preference in store.preferences_of_prompt(&largest.prompt)? {
            show(&preference);
        }
    }
    Ok(())
}
