//! The preference ledger: every comparison with its scores, who won and why, under which policy.

use std::io::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kv::Changes;
use crate::{Result, Store, key, record};

/// What was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    Text(String),
    Conversation(Vec<Turn>),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

/// One comparison of the completions of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    pub step: u64,
    /// Place of the prompt in the step.
    pub index: u32,
    /// Row of the prompt in its file.
    pub row: u64,
    /// Updates the policy had seen when it answered.
    pub policy_version: u64,
    pub prompt: Prompt,
    pub completions: Vec<String>,
    /// One score each.
    pub scores: Vec<f64>,
    /// The scorer's word on each.
    pub reasons: Vec<String>,
    /// Winner and loser, or none for a tie.
    pub pair: Option<(u32, u32)>,
    /// Milliseconds since 1970 when it was written down.
    pub time_ms: u64,
}

impl Preference {
    /// Score of the winner minus score of the loser; 0 for a tie.
    pub fn margin(&self) -> f64 {
        self.pair.map_or(0.0, |(won, lost)| self.scores[won as usize] - self.scores[lost as usize])
    }

    /// The same comparison, whenever it was written.
    fn same(&self, other: &Self) -> bool {
        Self { time_ms: 0, ..self.clone() } == Self { time_ms: 0, ..other.clone() }
    }

    /// A row in TRL's columns; none for a tie. Extra columns carry what the pair came from.
    pub fn to_trl(&self) -> Option<Value> {
        let (won, lost) = self.pair?;
        let said = |i: u32| self.completions[i as usize].clone();
        let (prompt, chosen, rejected) = match &self.prompt {
            Prompt::Text(text) => (json!(text), json!(said(won)), json!(said(lost))),
            Prompt::Conversation(turns) => {
                let message = |text: String| json!([{"role": "assistant", "content": text}]);
                (json!(turns), message(said(won)), message(said(lost)))
            }
        };
        Some(json!({
            "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "score_chosen": self.scores[won as usize], "score_rejected": self.scores[lost as usize],
            "step": self.step, "policy_version": self.policy_version,
        }))
    }
}

/// Identity of a prompt in the index.
fn hash(prompt: &Prompt) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    match prompt {
        Prompt::Text(text) => {
            hasher.update(b"text\0").update(text.as_bytes());
        }
        Prompt::Conversation(turns) => {
            for turn in turns {
                hasher.update(turn.role.as_bytes()).update(b"\0").update(turn.content.as_bytes()).update(b"\0");
            }
        }
    }
    *hasher.finalize().as_bytes()
}

impl Store {
    /// Writes comparisons down. One that is there already, as after a resume, keeps its time.
    pub fn log_preferences(&mut self, preferences: &[Preference]) -> Result<()> {
        let mut changes = Changes::default();
        for p in preferences {
            let key = key::item(key::LEDGER, p.step, p.index);
            let known: Option<Preference> = record::get(&*self.kv, &key, record::LEDGER)?;
            if known.is_some_and(|known| known.same(p)) {
                continue;
            }
            record::put(&mut changes, key, record::LEDGER, p)?;
            changes.put(key::prompt_item(&hash(&p.prompt), p.step, p.index), Vec::new());
        }
        if changes.0.is_empty() { Ok(()) } else { self.kv.apply(changes) }
    }

    /// All comparisons, by step.
    pub fn preferences(&self) -> Result<impl Iterator<Item = Result<Preference>>> {
        let entries = self.kv.scan(key::LEDGER)?;
        Ok(entries.map(|entry| entry.and_then(|(key, value)| record::decode(&*self.kv, &key, &value, record::LEDGER))))
    }

    /// The comparisons of one step.
    pub fn preferences_of_step(&self, step: u64) -> Result<Vec<Preference>> {
        self.of_step(key::LEDGER, step, record::LEDGER)
    }

    /// All comparisons of one prompt, by step.
    pub fn preferences_of_prompt(&self, prompt: &Prompt) -> Result<Vec<Preference>> {
        let keys: Vec<_> = self
            .kv
            .scan(&key::prompt(&hash(prompt)))?
            .map(|e| e.map(|(k, _)| key::indexed(&k)))
            .collect::<Result<_>>()?;
        keys.iter().filter_map(|key| record::get(&*self.kv, key, record::LEDGER).transpose()).collect()
    }

    /// Writes every pair as a line of JSON in TRL's columns; returns how many, and how many ties were left out.
    pub fn export_preferences(&self, out: &mut dyn Write) -> Result<(u64, u64)> {
        let (mut pairs, mut ties) = (0, 0);
        for preference in self.preferences()? {
            match preference?.to_trl() {
                Some(row) => {
                    writeln!(out, "{row}").map_err(|source| crate::Error::Io { path: "the export".into(), source })?;
                    pairs += 1;
                }
                None => ties += 1,
            }
        }
        Ok((pairs, ties))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preference(step: u64, prompt: &str, scores: [f64; 2]) -> Preference {
        Preference {
            step,
            index: 0,
            row: 3,
            policy_version: step,
            prompt: Prompt::Text(prompt.into()),
            completions: vec!["a".into(), "b".into()],
            scores: scores.to_vec(),
            reasons: vec![String::new(); 2],
            pair: (scores[0] != scores[1]).then_some(if scores[0] > scores[1] { (0, 1) } else { (1, 0) }),
            time_ms: step * 10,
        }
    }

    fn store(directory: &std::path::Path) -> Store {
        Store::with_kv(Box::new(crate::MemoryKv::default()), directory).unwrap()
    }

    #[test]
    fn the_ledger_answers_by_step_and_by_prompt() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        let all = [preference(1, "x", [0.0, 2.0]), preference(2, "y", [1.0, 0.0]), preference(300, "x", [0.5, 0.0])];
        store.log_preferences(&all).unwrap();
        assert_eq!(store.preferences().unwrap().collect::<Result<Vec<_>>>().unwrap(), all);
        assert_eq!(store.preferences_of_step(2).unwrap(), [all[1].clone()]);
        assert_eq!(store.preferences_of_prompt(&Prompt::Text("x".into())).unwrap(), [all[0].clone(), all[2].clone()]);
        assert_eq!(all[0].margin(), 2.0);
    }

    #[test]
    fn writing_the_same_again_keeps_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        let first = preference(1, "x", [0.0, 1.0]);
        store.log_preferences(std::slice::from_ref(&first)).unwrap();
        store.log_preferences(&[Preference { time_ms: 999, ..first.clone() }]).unwrap();
        assert_eq!(store.preferences_of_step(1).unwrap(), [first]);
    }

    #[test]
    fn an_export_has_trls_columns_and_no_ties() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        store.log_preferences(&[preference(1, "x", [0.0, 1.0]), preference(2, "y", [1.0, 1.0])]).unwrap();
        let mut out = Vec::new();
        assert_eq!(store.export_preferences(&mut out).unwrap(), (1, 1));
        let row: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&row["prompt"], &row["chosen"], &row["rejected"]), (&json!("x"), &json!("b"), &json!("a")));
    }
}
