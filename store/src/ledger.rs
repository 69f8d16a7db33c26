//! The preference ledger: one record per comparison of a prompt's completions, with the judge, its replies, the order in
//! which it was shown the completions, the policy version and the usage. And the cache of judges' replies.

use std::ops::{Bound, Range};

use serde::{Deserialize, Serialize};

use crate::kv::WriteBatch;
use crate::{Result, Store, key, record};

/// The prompt of a preference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// A text that is no conversation.
    Text(String),
    /// Messages, the oldest first.
    Conversation(Vec<Turn>),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

/// A request to a judge or a person, and the reply.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Exchange {
    /// Name of the judge, with its version.
    pub judge: String,
    /// Name of the prompt template with a hash of its text; empty where there is none.
    pub template: String,
    /// Indices of the completions in the order in which they were shown.
    pub shown: Vec<u32>,
    /// The reply, verbatim.
    pub reply: String,
    /// Probability that the completion shown first is better than the second; `None` for grades, rankings, and replies that
    /// could not be parsed.
    pub first: Option<f64>,
    /// Usage of the request when it was made. An exchange whose reply came from the cache has it too, so that the ledger
    /// does not depend on interruptions; [`Store::spent`] counts each request once.
    pub usage: Usage,
}

/// Usage of judges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Number of requests.
    pub calls: u64,
    /// Tokens of the requests, as the servers count them.
    pub input_tokens: u64,
    /// Tokens of the replies, as the servers count them.
    pub output_tokens: u64,
    /// Cost in the currency of the configured prices.
    pub money: f64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        // A server may claim any number.
        self.calls = self.calls.saturating_add(other.calls);
        self.input_tokens = self.input_tokens.saturating_add(other.input_tokens);
        self.output_tokens = self.output_tokens.saturating_add(other.output_tokens);
        self.money += other.money;
    }
}

/// A cached reply of a judge.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CachedReply {
    /// The reply, verbatim.
    pub reply: String,
    /// Usage of the request.
    pub usage: Usage,
}

impl record::Record for CachedReply {
    fn decode(version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        if version > 1 {
            return postcard::from_bytes(bytes);
        }
        Ok(Self { reply: postcard::from_bytes(bytes)?, usage: Usage::default() })
    }
}

/// A comparison of the completions of a prompt, or a demonstration: one completion that a person wrote.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// Step of the job.
    pub step: u64,
    /// Index of the prompt in the step.
    pub index: u32,
    /// Row of the prompt in its file.
    pub row: u64,
    /// Version of the policy that sampled the completions: its number of updates.
    pub policy_version: u64,
    /// The prompt that was answered.
    pub prompt: Prompt,
    /// Texts of the completions.
    pub completions: Vec<String>,
    /// One score for each completion, higher is better; empty for a demonstration.
    pub scores: Vec<f64>,
    /// One explanation for each completion, each possibly empty.
    pub reasons: Vec<String>,
    /// Indices of the chosen and the rejected completion; `None` for a tie.
    pub pair: Option<(u32, u32)>,
    /// Unix time in milliseconds when it was written.
    pub time_ms: u64,
    /// Name of the judge with its version; for a demonstration, of its author.
    pub judge: String,
    /// Requests to judges and people, and their replies; empty for rules and reward models.
    pub exchanges: Vec<Exchange>,
}

impl Prompt {
    /// The text, or the content of the last message; empty without one.
    pub fn last(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Conversation(turns) => turns.last().map_or("", |turn| &turn.content),
        }
    }
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// Version 1 of the record.
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

/// Added to the index of a record to make that of the one by which a person overrules it.
pub const OVERRULES: u32 = 1 << 31;

impl Preference {
    /// The index of the record, in the same step, that this one overrules: a person's ranking in place of a judge's.
    pub fn overrules(&self) -> Option<u32> {
        self.index.checked_sub(OVERRULES)
    }

    /// Score of the chosen completion minus that of the rejected one; 0 for a tie.
    pub fn margin(&self) -> f64 {
        let score = |i: u32| self.scores.get(i as usize).copied().unwrap_or(0.0);
        self.pair.map_or(0.0, |(chosen, rejected)| score(chosen) - score(rejected))
    }

    /// Whether this is a demonstration.
    pub fn is_demonstration(&self) -> bool {
        self.scores.is_empty() && self.completions.len() == 1
    }

    /// Rank of each completion by score: 1 is best, and equal scores have equal ranks.
    pub fn ranks(&self) -> Vec<u32> {
        let rank = |s: &f64| 1 + self.scores.iter().filter(|other| *other > s).count() as u32;
        self.scores.iter().map(rank).collect()
    }

    /// Disagreement of the judges, in `[0, 1]`: over all exchanges on the same two completions, in either order, the
    /// largest difference of the probabilities that one of the two is better. 0 for a single exchange, 1 for certain
    /// judgements that contradict each other.
    pub fn disagreement(&self) -> f64 {
        let ordered = |e: &Exchange| match (e.first, e.shown.as_slice()) {
            (Some(first), &[a, b]) if a < b => Some((a, b, first)),
            (Some(first), &[a, b]) => Some((b, a, 1.0 - first)),
            _ => None,
        };
        let judgements: Vec<_> = self.exchanges.iter().filter_map(ordered).collect();
        let gap = |x: &(u32, u32, f64)| {
            let same = judgements.iter().filter(move |y| (x.0, x.1) == (y.0, y.1));
            same.map(|y| (x.2 - y.2).abs()).fold(0.0, f64::max)
        };
        judgements.iter().map(gap).fold(0.0, f64::max)
    }

    /// Whether the prompt, a completion or a reply contains a text, which is in lower case.
    fn has_text(&self, lower: &str) -> bool {
        let has = |text: &String| text.to_lowercase().contains(lower);
        let prompt = match &self.prompt {
            Prompt::Text(text) => has(text),
            Prompt::Conversation(turns) => turns.iter().any(|turn| has(&turn.content)),
        };
        prompt || self.completions.iter().any(has) || self.exchanges.iter().any(|e| has(&e.reply))
    }

    /// Whether two records are equal but for the time at which they were written.
    fn same_content(&self, other: &Self) -> bool {
        Self { time_ms: 0, ..self.clone() } == Self { time_ms: 0, ..other.clone() }
    }
}

/// A filter on the ledger; the default matches everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Steps of the job.
    pub steps: Option<Range<u64>>,
    /// The prompt, in full.
    pub prompt: Option<Prompt>,
    /// A part of the name of the judge, or of a judge in one of the exchanges.
    pub judge: Option<String>,
    /// Smallest [`Preference::disagreement`].
    pub disagreement_min: f64,
    /// A part of the prompt, of a completion or of a judge's reply, without regard to case.
    #[serde(default)]
    pub text: Option<String>,
    /// Only what comes after the record of this step and index.
    #[serde(default)]
    pub after: Option<(u64, u32)>,
}

impl Query {
    fn matches(&self, p: &Preference) -> bool {
        let judged = |name: &String| p.judge.contains(name) || p.exchanges.iter().any(|e| e.judge.contains(name));
        self.steps.as_ref().is_none_or(|steps| steps.contains(&p.step))
            && self.prompt.as_ref().is_none_or(|prompt| *prompt == p.prompt)
            && self.judge.as_ref().is_none_or(judged)
            && p.disagreement() >= self.disagreement_min
            && self.after.is_none_or(|after| (p.step, p.index) > after)
            && self.text.as_ref().is_none_or(|text| p.has_text(&text.to_lowercase()))
    }

    /// The key that all matches come after, or begin at.
    fn first(&self) -> Bound<Vec<u8>> {
        let start = self.steps.as_ref().map_or(0, |steps| steps.start);
        match self.after {
            Some((step, index)) if step >= start => Bound::Excluded(key::item(key::LEDGER, step, index)),
            _ => Bound::Included(key::step(key::LEDGER, start)),
        }
    }
}

/// Name under which the job's state holds the total usage of judges.
const SPENT: &str = "spent";

/// Hash of a prompt for the index.
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
    /// Writes preferences. One that is there already, as after a resume, keeps its time; one with other content at the same
    /// step and index is replaced.
    pub fn log_preferences(&mut self, preferences: &[Preference]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for p in preferences {
            let key = key::item(key::LEDGER, p.step, p.index);
            let known: Option<Preference> = record::get(&*self.kv, &key, record::LEDGER)?;
            match known {
                Some(known) if known.same_content(p) => continue,
                Some(known) => batch.remove(key::prompt_item(&hash(&known.prompt), p.step, p.index)),
                None => {}
            }
            record::put(&mut batch, key, record::LEDGER, p)?;
            batch.put(key::prompt_item(&hash(&p.prompt), p.step, p.index), Vec::new());
        }
        if batch.0.is_empty() { Ok(()) } else { self.kv.apply(batch) }
    }

    /// All preferences, in the order of steps and indices.
    pub fn preferences(&self) -> Result<impl Iterator<Item = Result<Preference>>> {
        self.preferences_from(Bound::Included(key::LEDGER.to_vec()))
    }

    /// The preferences from a key on.
    fn preferences_from(&self, from: Bound<Vec<u8>>) -> Result<impl Iterator<Item = Result<Preference>>> {
        let entries = self.kv.scan_from(key::LEDGER, from.as_ref().map(Vec::as_slice))?;
        Ok(entries.map(|entry| entry.and_then(|(key, value)| record::decode(&*self.kv, &key, &value, record::LEDGER))))
    }

    /// The preferences of one step, in the order of indices.
    pub fn preferences_of_step(&self, step: u64) -> Result<Vec<Preference>> {
        self.of_step(key::LEDGER, step, record::LEDGER)
    }

    /// All preferences on one prompt, in the order of steps and indices.
    pub fn preferences_of_prompt(&self, prompt: &Prompt) -> Result<Vec<Preference>> {
        let keys: Vec<_> = self
            .kv
            .scan(&key::prompt(&hash(prompt)))?
            .map(|e| e.map(|(k, _)| key::indexed(&k)))
            .collect::<Result<_>>()?;
        keys.iter().filter_map(|key| record::get(&*self.kv, key, record::LEDGER).transpose()).collect()
    }

    /// The preferences that match a query, in the order of steps and indices.
    pub fn query(&self, query: Query) -> Result<impl Iterator<Item = Result<Preference>>> {
        let all: Box<dyn Iterator<Item = Result<Preference>>> = match &query.prompt {
            Some(prompt) => Box::new(self.preferences_of_prompt(prompt)?.into_iter().map(Ok)),
            None => Box::new(self.preferences_from(query.first())?),
        };
        let end = query.steps.as_ref().map_or(u64::MAX, |steps| steps.end);
        let before_end = move |p: &Result<Preference>| p.as_ref().map_or(true, |p| p.step < end);
        Ok(all.take_while(before_end).filter(move |p| p.as_ref().map_or(true, |p| query.matches(p))))
    }

    /// The cached reply of a judge to a request, by the hash of the request.
    pub fn cached_reply(&self, key: &str) -> Result<Option<CachedReply>> {
        record::get(&*self.kv, &key::reply(key), record::REPLY)
    }

    /// Caches replies of judges by the hashes of their requests, and adds `spent` to the total usage. Atomic.
    pub fn cache_replies(&mut self, entries: &[(String, CachedReply)], spent: Usage) -> Result<()> {
        let mut batch = WriteBatch::default();
        for (key, reply) in entries {
            record::put(&mut batch, key::reply(key), record::REPLY, reply)?;
        }
        let mut total = self.spent()?;
        total += spent;
        record::put(&mut batch, key::job(SPENT), record::JOB, &total)?;
        self.kv.apply(batch)
    }

    /// Total usage of all requests that the job has made to judges.
    pub fn spent(&self) -> Result<Usage> {
        Ok(self.get_job(SPENT)?.unwrap_or_default())
    }

    /// Deletes a preference, if it exists.
    pub fn retract_preference(&mut self, step: u64, index: u32) -> Result<()> {
        let key = key::item(key::LEDGER, step, index);
        let Some(known) = record::get::<Preference>(&*self.kv, &key, record::LEDGER)? else { return Ok(()) };
        let mut batch = WriteBatch::default();
        batch.remove(key::prompt_item(&hash(&known.prompt), step, index));
        record::remove(&*self.kv, &mut batch, key)?;
        self.kv.apply(batch)
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
    fn preferences_are_found_by_step_and_by_prompt() {
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
        let mut contradictory = preference(2, "y", [0.5, 0.5]);
        // It prefers the first one shown in both orders, which is a contradiction.
        contradictory.exchanges = vec![asked("gpt at home", [0, 1], 0.9), asked("gpt at home", [1, 0], 0.8)];
        let mut consistent = preference(3, "x", [1.0, 0.0]);
        consistent.exchanges = vec![asked("gpt at home", [0, 1], 0.9), asked("gpt at home", [1, 0], 0.2)];
        assert!((contradictory.disagreement() - 0.7).abs() < 1e-12 && (consistent.disagreement() - 0.1).abs() < 1e-12);
        store.log_preferences(&[preference(1, "x", [0.0, 2.0]), contradictory, consistent]).unwrap();
        let steps = |query: Query| store.query(query).unwrap().map(|p| p.unwrap().step).collect::<Vec<_>>();
        assert_eq!(steps(Query::default()), [1, 2, 3]);
        assert_eq!(steps(Query { judge: Some("gpt".into()), ..Query::default() }), [2, 3]);
        assert_eq!(steps(Query { judge: Some("rules".into()), steps: Some(0..3), ..Query::default() }), [1, 2]);
        assert_eq!(steps(Query { prompt: Some(Prompt::Text("x".into())), ..Query::default() }), [1, 3]);
        assert_eq!(steps(Query { disagreement_min: 0.5, ..Query::default() }), [2]);
    }

    #[test]
    fn a_deleted_or_replaced_preference_leaves_no_index_entry() {
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
    fn a_record_of_version_1_is_read() {
        #[derive(Serialize)]
        struct Old<'a>(u64, u32, u64, u64, Prompt, Vec<&'a str>, Vec<f64>, Vec<&'a str>, Option<(u32, u32)>, u64);
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        let old =
            Old(7, 1, 3, 7, Prompt::Text("x".into()), vec!["a", "b"], vec![0.0, 1.0], vec![""; 2], Some((1, 0)), 9);
        let mut batch = WriteBatch::default();
        let first = record::Kind { version: 1, ..record::LEDGER };
        record::put(&mut batch, key::item(key::LEDGER, 7, 1), first, &old).unwrap();
        store.kv.apply(batch).unwrap();
        let read = store.preferences_of_step(7).unwrap().remove(0);
        assert_eq!((read.margin(), read.ranks(), read.judge.as_str()), (1.0, vec![2, 1], ""));
    }
}
