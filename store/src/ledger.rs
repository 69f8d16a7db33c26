//! The preference ledger: one record per verdict, with who judged, what was said, in which order the completions were
//! shown, under which policy, and what it cost.

use std::ops::Range;

use serde::{Deserialize, Serialize};

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

/// One question to a scorer, and its reply.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Exchange {
    /// Who was asked, with its version.
    pub judge: String,
    /// The template's name with a hash of its words; empty where none is needed.
    pub template: String,
    /// Places of the completions in the order in which they were shown.
    pub shown: Vec<u32>,
    /// The reply, word for word.
    pub reply: String,
    /// Probability that the first one shown is better than the second; `None` for grades, rankings, and what could not
    /// be understood.
    pub first: Option<f64>,
    /// What it cost when it was asked. One that was remembered from before carries that again, so that a resumed job's
    /// ledger is that of a whole one; [`Store::spent`] counts everything once.
    pub usage: Usage,
}

/// What questions cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    pub calls: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// In the currency of the configured prices.
    pub money: f64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.money += other.money;
    }
}

/// A judge's reply, kept so that the same is never paid for twice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct KeptReply {
    pub reply: String,
    pub usage: Usage,
}

impl record::Record for KeptReply {
    fn decode(version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        if version > 1 {
            return postcard::from_bytes(bytes);
        }
        Ok(Self { reply: postcard::from_bytes(bytes)?, usage: Usage::default() })
    }
}

/// One verdict on the completions of a prompt, or a demonstration: one completion that a person wrote.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
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
    /// One score each; none for a demonstration.
    pub scores: Vec<f64>,
    /// The scorer's word on each.
    pub reasons: Vec<String>,
    /// Winner and loser, or none for a tie.
    pub pair: Option<(u32, u32)>,
    /// Milliseconds since 1970 when it was written down.
    pub time_ms: u64,
    /// Who judged, with its version; for a demonstration, who wrote it.
    pub judge: String,
    /// What was asked of judges and people, and what they said. Rules and reward models are asked nothing in words.
    pub exchanges: Vec<Exchange>,
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// The record as version 1 wrote it.
#[derive(Deserialize)]
struct PreferenceV1 {
    step: u64,
    index: u32,
    row: u64,
    policy_version: u64,
    prompt: Prompt,
    completions: Vec<String>,
    scores: Vec<f64>,
    reasons: Vec<String>,
    pair: Option<(u32, u32)>,
    time_ms: u64,
}

impl record::Record for Preference {
    fn decode(version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        if version > 1 {
            return postcard::from_bytes(bytes);
        }
        let PreferenceV1 { step, index, row, policy_version, prompt, completions, scores, reasons, pair, time_ms } =
            postcard::from_bytes(bytes)?;
        let (judge, exchanges) = (String::new(), Vec::new());
        Ok(Self {
            step,
            index,
            row,
            policy_version,
            prompt,
            completions,
            scores,
            reasons,
            pair,
            time_ms,
            judge,
            exchanges,
        })
    }
}

impl Preference {
    /// Score of the winner minus score of the loser; 0 for a tie.
    pub fn margin(&self) -> f64 {
        let score = |i: u32| self.scores.get(i as usize).copied().unwrap_or(0.0);
        self.pair.map_or(0.0, |(won, lost)| score(won) - score(lost))
    }

    /// Whether a person wrote it, with nothing to compare.
    pub fn is_demonstration(&self) -> bool {
        self.scores.is_empty() && self.completions.len() == 1
    }

    /// Ranks by score: 1 is best, and equal scores share a rank.
    pub fn ranks(&self) -> Vec<u32> {
        let rank = |s: &f64| 1 + self.scores.iter().filter(|other| *other > s).count() as u32;
        self.scores.iter().map(rank).collect()
    }

    /// How far those who were asked about the same two completions, in either order or one after the other, are apart:
    /// the largest difference of their probabilities that one of the two is better. 0 for one voice, 1 for two that
    /// contradict each other outright.
    pub fn disagreement(&self) -> f64 {
        let said = |e: &Exchange| match (e.first, e.shown.as_slice()) {
            (Some(first), &[a, b]) if a < b => Some((a, b, first)),
            (Some(first), &[a, b]) => Some((b, a, 1.0 - first)),
            _ => None,
        };
        let voices: Vec<_> = self.exchanges.iter().filter_map(said).collect();
        let gap = |x: &(u32, u32, f64)| {
            let same = voices.iter().filter(move |y| (x.0, x.1) == (y.0, y.1));
            same.map(|y| (x.2 - y.2).abs()).fold(0.0, f64::max)
        };
        voices.iter().map(gap).fold(0.0, f64::max)
    }

    /// The same verdict, whenever it was written.
    fn same(&self, other: &Self) -> bool {
        Self { time_ms: 0, ..self.clone() } == Self { time_ms: 0, ..other.clone() }
    }
}

/// What is wanted of the ledger; the default is all of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Query {
    pub steps: Option<Range<u64>>,
    pub prompt: Option<Prompt>,
    /// Part of the name of who judged, or of one of those who were asked.
    pub judge: Option<String>,
    /// [`Preference::disagreement`] at least.
    pub disagreement_min: f64,
}

impl Query {
    fn wants(&self, p: &Preference) -> bool {
        let judged = |name: &String| p.judge.contains(name) || p.exchanges.iter().any(|e| e.judge.contains(name));
        self.steps.as_ref().is_none_or(|steps| steps.contains(&p.step))
            && self.prompt.as_ref().is_none_or(|prompt| *prompt == p.prompt)
            && self.judge.as_ref().is_none_or(judged)
            && p.disagreement() >= self.disagreement_min
    }
}

/// Name of the job's state that adds up what judges cost.
const SPENT: &str = "spent";

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
    /// Writes verdicts down. One that is there already, as after a resume, keeps its time; another replaces it.
    pub fn log_preferences(&mut self, preferences: &[Preference]) -> Result<()> {
        let mut changes = Changes::default();
        for p in preferences {
            let key = key::item(key::LEDGER, p.step, p.index);
            let known: Option<Preference> = record::get(&*self.kv, &key, record::LEDGER)?;
            match known {
                Some(known) if known.same(p) => continue,
                Some(known) => changes.remove(key::prompt_item(&hash(&known.prompt), p.step, p.index)),
                None => {}
            }
            record::put(&mut changes, key, record::LEDGER, p)?;
            changes.put(key::prompt_item(&hash(&p.prompt), p.step, p.index), Vec::new());
        }
        if changes.0.is_empty() { Ok(()) } else { self.kv.apply(changes) }
    }

    /// All verdicts, by step.
    pub fn preferences(&self) -> Result<impl Iterator<Item = Result<Preference>>> {
        let entries = self.kv.scan(key::LEDGER)?;
        Ok(entries.map(|entry| entry.and_then(|(key, value)| record::decode(&*self.kv, &key, &value, record::LEDGER))))
    }

    /// The verdicts of one step.
    pub fn preferences_of_step(&self, step: u64) -> Result<Vec<Preference>> {
        self.of_step(key::LEDGER, step, record::LEDGER)
    }

    /// All verdicts on one prompt, by step.
    pub fn preferences_of_prompt(&self, prompt: &Prompt) -> Result<Vec<Preference>> {
        let keys: Vec<_> = self
            .kv
            .scan(&key::prompt(&hash(prompt)))?
            .map(|e| e.map(|(k, _)| key::indexed(&k)))
            .collect::<Result<_>>()?;
        keys.iter().filter_map(|key| record::get(&*self.kv, key, record::LEDGER).transpose()).collect()
    }

    /// The verdicts that a query wants, by step.
    pub fn query(&self, query: Query) -> Result<impl Iterator<Item = Result<Preference>>> {
        let all: Box<dyn Iterator<Item = Result<Preference>>> = match &query.prompt {
            Some(prompt) => Box::new(self.preferences_of_prompt(prompt)?.into_iter().map(Ok)),
            None => Box::new(self.preferences()?),
        };
        Ok(all.filter(move |p| p.as_ref().map_or(true, |p| query.wants(p))))
    }

    /// What a judge said when it was asked the same, by the hash of the question.
    pub fn recall(&self, key: &str) -> Result<Option<KeptReply>> {
        record::get(&*self.kv, &key::reply(key), record::REPLY)
    }

    /// Keeps what a judge said and adds up what it cost; all of it, or nothing.
    pub fn remember(&mut self, entries: &[(String, KeptReply)], spent: Usage) -> Result<()> {
        let mut changes = Changes::default();
        for (key, said) in entries {
            record::put(&mut changes, key::reply(key), record::REPLY, said)?;
        }
        let mut total = self.spent()?;
        total += spent;
        record::put(&mut changes, key::job(SPENT), record::JOB, &total)?;
        self.kv.apply(changes)
    }

    /// What all questions of the job have cost.
    pub fn spent(&self) -> Result<Usage> {
        Ok(self.get_job(SPENT)?.unwrap_or_default())
    }

    /// Takes a verdict back.
    pub fn retract_preference(&mut self, step: u64, index: u32) -> Result<()> {
        let key = key::item(key::LEDGER, step, index);
        let Some(known) = record::get::<Preference>(&*self.kv, &key, record::LEDGER)? else { return Ok(()) };
        let mut changes = Changes::default();
        changes.remove(key::prompt_item(&hash(&known.prompt), step, index));
        record::remove(&*self.kv, &mut changes, key)?;
        self.kv.apply(changes)
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
            judge: "rules".into(),
            exchanges: Vec::new(),
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

    fn asked(judge: &str, shown: [u32; 2], first: f64) -> Exchange {
        Exchange { judge: judge.into(), shown: shown.to_vec(), first: Some(first), ..Exchange::default() }
    }

    #[test]
    fn a_query_finds_by_judge_step_prompt_and_disagreement() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        let mut torn = preference(2, "y", [0.5, 0.5]);
        // Both times the first one shown: the two orders contradict each other.
        torn.exchanges = vec![asked("gpt at home", [0, 1], 0.9), asked("gpt at home", [1, 0], 0.8)];
        let mut sure = preference(3, "x", [1.0, 0.0]);
        sure.exchanges = vec![asked("gpt at home", [0, 1], 0.9), asked("gpt at home", [1, 0], 0.2)];
        assert!((torn.disagreement() - 0.7).abs() < 1e-12 && (sure.disagreement() - 0.1).abs() < 1e-12);
        store.log_preferences(&[preference(1, "x", [0.0, 2.0]), torn, sure]).unwrap();
        let steps = |query: Query| store.query(query).unwrap().map(|p| p.unwrap().step).collect::<Vec<_>>();
        assert_eq!(steps(Query::default()), [1, 2, 3]);
        assert_eq!(steps(Query { judge: Some("gpt".into()), ..Query::default() }), [2, 3]);
        assert_eq!(steps(Query { judge: Some("rules".into()), steps: Some(0..3), ..Query::default() }), [1, 2]);
        assert_eq!(steps(Query { prompt: Some(Prompt::Text("x".into())), ..Query::default() }), [1, 3]);
        assert_eq!(steps(Query { disagreement_min: 0.5, ..Query::default() }), [2]);
    }

    #[test]
    fn a_verdict_taken_back_is_gone_and_one_replaced_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        store.log_preferences(&[preference(1, "x", [0.0, 2.0])]).unwrap();
        store.log_preferences(&[preference(1, "y", [0.0, 2.0])]).unwrap();
        assert!(store.preferences_of_prompt(&Prompt::Text("x".into())).unwrap().is_empty());
        store.retract_preference(1, 0).unwrap();
        store.retract_preference(1, 0).unwrap();
        assert_eq!(store.preferences().unwrap().count(), 0);
        assert!(store.preferences_of_prompt(&Prompt::Text("y".into())).unwrap().is_empty());
    }

    #[test]
    fn a_record_of_the_first_version_is_read() {
        #[derive(Serialize)]
        struct Old<'a>(u64, u32, u64, u64, Prompt, Vec<&'a str>, Vec<f64>, Vec<&'a str>, Option<(u32, u32)>, u64);
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        let old =
            Old(7, 1, 3, 7, Prompt::Text("x".into()), vec!["a", "b"], vec![0.0, 1.0], vec![""; 2], Some((1, 0)), 9);
        let mut changes = Changes::default();
        let first = record::Kind { version: 1, ..record::LEDGER };
        record::put(&mut changes, key::item(key::LEDGER, 7, 1), first, &old).unwrap();
        store.kv.apply(changes).unwrap();
        let read = store.preferences_of_step(7).unwrap().remove(0);
        assert_eq!((read.margin(), read.ranks(), read.judge.as_str()), (1.0, vec![2, 1], ""));
    }
}
