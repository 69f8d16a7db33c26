//! How often the rule `math_equal` agrees with labels. A line of the file is a JSON object with `completion`, `reference` and
//! `correct`, true or false. Disagreements are printed.
//!
//!   cargo run --example verify_answers -- cases.jsonl

use std::io::BufRead;

use rehearsal::rewards::verify::math::{Extraction, is_correct};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().nth(1).ok_or("name a file of cases")?;
    let (mut cases, mut agreed) = (0, 0);
    for line in std::io::BufReader::new(std::fs::File::open(file)?).lines() {
        let case: Value = serde_json::from_str(&line?)?;
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let verdict = is_correct(text("completion"), text("reference"), Extraction::Any);
        cases += 1;
        if verdict.unwrap_or(false) == (case["correct"] == true) {
            agreed += 1;
        } else {
            let read = if verdict.is_none() { " (the reference is not read)" } else { "" };
            println!("{} for {}, wanted {}{read}", case["completion"], case["reference"], case["correct"]);
        }
    }
    println!("{agreed} of {cases} agree");
    Ok(())
}
