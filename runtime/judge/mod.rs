//! A language model as judge: it reads answers to a question in both orders, or grades one at a time, and its verdicts
//! become scores (Zheng et al. 2023; Lee et al. 2023; Guo et al. 2024).
//!
//! Every verdict is remembered by what was asked, so that a resumed job or a second epoch never pays twice.

mod api;
mod http;
mod local;
mod template;
mod verdict;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use rehearsal_learn::evaluation::judge::BothOrders;

pub use api::ApiJudge;
pub use http::{Endpoint, HttpScorer};
pub use local::LocalJudge;
pub use template::{NAMES, Template};
pub use verdict::{Verdict, grade, preference};

/// What a judge is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// How it is to judge.
    pub system: String,
    /// What it is to judge.
    pub text: String,
    pub kind: QuestionKind,
}

/// The answer a question wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuestionKind {
    /// Which of two answers is better.
    Pair,
    /// A grade from 1 to 10.
    Grade,
}

/// What a judge said.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Its words; for a local judge, the probabilities of its verdict tokens.
    pub raw: String,
    /// What was understood; `None` for what could not be.
    pub verdict: Option<Verdict>,
}

/// Something that answers questions about answers.
pub trait Judge: Send + Sync {
    /// Names the judge and its version, so that verdicts of different judges are told apart.
    fn id(&self) -> &str;

    /// A reply to each question, in order.
    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError>;
}

/// Where verdicts are remembered by the hash of what was asked.
pub trait Memory: Send + Sync {
    /// The raw replies to those that were asked before.
    fn recall(&self, keys: &[String]) -> Result<Vec<Option<String>>, RewardError>;

    /// Keeps raw replies, before anything is done with them.
    fn remember(&self, entries: Vec<(String, String)>) -> Result<(), RewardError>;
}

/// How verdicts on pairs become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Both orders are asked and their probabilities averaged.
    Average,
    /// Both orders are asked; a win needs both, anything else is a tie.
    Agree,
    /// The first order alone, position bias and all.
    First,
}

/// What a judge is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every completion of a prompt against every other: its score is the share it wins.
    Pairwise(Orders),
    /// Every completion by itself, from 1 to 10.
    Grade,
}

/// A judge as a reward.
pub struct JudgeReward {
    judge: Box<dyn Judge>,
    template: Template,
    mode: Mode,
    memory: Option<Arc<dyn Memory>>,
    /// Questions that may be asked in all; 0 for any number.
    calls_max: u64,
    calls: AtomicU64,
}

impl JudgeReward {
    /// A judge with its way of asking. `calls_max` bounds the questions that this process may ask; 0 does not.
    pub fn new(
        judge: Box<dyn Judge>,
        template: Template,
        mode: Mode,
        memory: Option<Arc<dyn Memory>>,
        calls_max: u64,
    ) -> Self {
        Self { judge, template, mode, memory, calls_max, calls: AtomicU64::new(0) }
    }

    /// Replies, from memory where the same was asked before. What cannot be understood is asked once more.
    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        let keys: Vec<String> = questions.iter().map(|q| self.key(q)).collect();
        let known = match &self.memory {
            Some(memory) => memory.recall(&keys)?,
            None => vec![None; keys.len()],
        };
        let understood = |question: &Question, raw: String| {
            let verdict = match question.kind {
                QuestionKind::Pair => preference(&raw),
                QuestionKind::Grade => grade(&raw),
            };
            Reply { raw, verdict }
        };
        let mut replies: Vec<Option<Reply>> =
            known.into_iter().zip(questions).map(|(raw, q)| raw.map(|raw| understood(q, raw))).collect();
        // What was remembered is settled, readable or not; what is new and cannot be read is asked once more.
        let mut open: Vec<usize> = (0..questions.len()).filter(|&i| replies[i].is_none()).collect();
        for last in [false, true] {
            if open.is_empty() {
                break;
            }
            let asked = self.calls.fetch_add(open.len() as u64, Ordering::Relaxed) + open.len() as u64;
            if self.calls_max > 0 && asked > self.calls_max {
                return Err(RewardError::Budget { name: self.judge.id().into(), calls: self.calls_max });
            }
            let fresh = self.judge.ask(&open.iter().map(|&i| questions[i].clone()).collect::<Vec<_>>())?;
            if let Some(memory) = &self.memory {
                let settled = open.iter().zip(&fresh).filter(|(_, r)| last || r.verdict.is_some());
                memory.remember(settled.map(|(&i, r)| (keys[i].clone(), r.raw.clone())).collect())?;
            }
            open.iter().zip(fresh).for_each(|(&i, reply)| replies[i] = Some(reply));
            open.retain(|&i| replies[i].as_ref().is_some_and(|r| r.verdict.is_none()));
        }
        let lost = Reply { raw: String::new(), verdict: None };
        Ok(replies.into_iter().map(|r| r.unwrap_or(lost.clone())).collect())
    }

    fn key(&self, question: &Question) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [self.judge.id(), &question.system, &question.text] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Scores of the completions of one prompt by their wins.
    fn compare(&self, group: &[Sample], orders: Orders) -> Result<Vec<Judged>, RewardError> {
        let pairs: Vec<(usize, usize)> =
            (0..group.len()).flat_map(|i| (i + 1..group.len()).map(move |j| (i, j))).collect();
        let ask = |a: usize, b: usize| self.template.pair(&group[a], &group[b]);
        let mut questions: Vec<Question> = Vec::new();
        for &(a, b) in &pairs {
            questions.push(ask(a, b));
            if orders != Orders::First {
                questions.push(ask(b, a));
            }
        }
        let replies = self.ask(&questions)?;
        let step = if orders == Orders::First { 1 } else { 2 };
        let mut wins = vec![0.0; group.len()];
        let mut reasons = vec![Vec::new(); group.len()];
        for (&(a, b), said) in pairs.iter().zip(replies.chunks(step)) {
            let first = |r: &Reply| r.verdict.map_or(0.5, |v| v.first);
            let unreadable = said.iter().filter(|r| r.verdict.is_none()).count();
            let both = BothOrders {
                shown_first: first(&said[0]),
                shown_second: said.get(1).map_or(first(&said[0]), |r| 1.0 - first(r)),
            };
            let won = match orders {
                Orders::Agree if (both.shown_first - 0.5) * (both.shown_second - 0.5) <= 0.0 => 0.5,
                Orders::Agree => f64::from(both.shown_first > 0.5),
                _ => both.probability(),
            };
            wins[a] += won;
            wins[b] += 1.0 - won;
            let note = if unreadable > 0 { format!(", {unreadable} unreadable") } else { String::new() };
            let seen = format!("{:.3} shown first, {:.3} second", both.shown_first, both.shown_second);
            reasons[a].push(format!("{won:.3} against #{b} ({seen}{note})"));
            reasons[b].push(format!("{:.3} against #{a}{note}", 1.0 - won));
        }
        let others = (group.len() - 1).max(1) as f64;
        let name = self.judge.id();
        let judged = |(wins, reasons): (f64, Vec<String>)| Judged {
            score: wins / others,
            reason: format!("{name}: {}", reasons.join("; ")),
        };
        Ok(wins.into_iter().zip(reasons).map(judged).collect())
    }

    fn grades(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let questions: Vec<Question> = samples.iter().map(|s| self.template.grade(s)).collect();
        let replies = self.ask(&questions)?;
        let judged = |reply: Reply| match reply.verdict {
            Some(verdict) => Judged { score: verdict.grade, reason: reply.raw },
            // The middle of the scale: nothing is known.
            None => Judged { score: 5.5, reason: format!("unreadable: {}", reply.raw) },
        };
        Ok(replies.into_iter().map(judged).collect())
    }
}

impl Reward for JudgeReward {
    fn name(&self) -> &str {
        self.judge.id()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        match self.mode {
            Mode::Grade => self.grades(samples),
            Mode::Pairwise(orders) => {
                // Completions of one prompt stand side by side.
                let groups = samples.chunk_by(|a, b| a.ids.prompt == b.ids.prompt && a.row == b.row);
                let mut all = Vec::with_capacity(samples.len());
                for group in groups {
                    all.extend(self.compare(group, orders)?);
                }
                Ok(all)
            }
        }
    }
}

#[cfg(test)]
mod tests;
