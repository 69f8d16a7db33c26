//! A language model as judge: it reads answers to a question in both orders, or grades one at a time, and its verdicts
//! become scores (Zheng et al. 2023; Lee et al. 2023; Guo et al. 2024).
//!
//! Every verdict is remembered by what was asked, so that a resumed job or a second epoch never pays twice.

mod api;
mod foreign;
mod http;
mod local;
mod template;
mod verdict;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use rehearsal_learn::evaluation::judge::BothOrders;
use rehearsal_store::{CachedReply, Exchange, Usage};

pub use api::{ApiJudge, ApiSettings, Prices};
pub use foreign::{Foreign, GGUF_KINDS as FOREIGN_GGUF_KINDS, KINDS as FOREIGN_KINDS};
pub use http::{Endpoint, FOREVER, HttpScorer, PostError};
pub use local::{JudgeModel, LocalJudge};
pub use rehearsal_actors::{Devices, Placement};
pub use template::{Form, NAMES, Template};
pub use verdict::{Verdict, understand};

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
    /// So many answers from best to worst.
    Ranking(usize),
}

/// What a judge said.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Its words; for a local judge, the probabilities of its verdict tokens.
    pub raw: String,
    /// What was understood; `None` for what could not be.
    pub verdict: Option<Verdict>,
    /// What it cost.
    pub usage: Usage,
}

/// Something that answers questions about answers.
pub trait Judge: Send + Sync {
    /// Names the judge and its version, so that verdicts of different judges are told apart.
    fn id(&self) -> &str;

    /// How long a reply may take; `None` leaves it to the job's limits.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// [`Reward::placements`].
    fn occupies(&self) -> Vec<Placement> {
        Vec::new()
    }

    /// A reply to each question, in order.
    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError>;
}

/// Where replies are remembered by the hash of what was asked, and what they cost is added up.
pub trait Memory: Send + Sync {
    /// The replies to those that were asked before.
    fn recall(&self, keys: &[String]) -> Result<Vec<Option<CachedReply>>, RewardError>;

    /// Keeps replies and what was spent, before anything is done with them.
    fn remember(&self, entries: Vec<(String, CachedReply)>, spent: Usage) -> Result<(), RewardError>;

    /// What has been spent since the job began.
    fn spent(&self) -> Result<Usage, RewardError>;
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
    /// All completions of a prompt at once, in order and in reverse: the score is the share of the others it beats.
    Ranking,
    /// Every completion by itself, from 1 to 10.
    Grade,
}

/// What a job may spend on a judge, all its runs together; 0 for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    pub calls: u64,
    /// Of questions and replies.
    pub tokens: u64,
    pub money: f64,
}

impl Budget {
    /// What it cannot bear: so many calls beyond what is spent, or the next one.
    fn exceeded(&self, spent: &Usage, calls: u64) -> Option<(String, &'static str)> {
        let tokens = spent.input_tokens + spent.output_tokens;
        if self.calls > 0 && spent.calls + calls > self.calls {
            return Some((format!("{} of {} calls, {calls} more wanted", spent.calls, self.calls), "judge.calls_max"));
        }
        if self.tokens > 0 && tokens >= self.tokens {
            return Some((format!("{tokens} of {} tokens", self.tokens), "judge.spend_tokens_max"));
        }
        (self.money > 0.0 && spent.money >= self.money)
            .then(|| (format!("{:.4} of {}", spent.money, self.money), "judge.spend_max"))
    }
}

/// A judge as a reward.
pub struct JudgeReward {
    judge: Box<dyn Judge>,
    template: Template,
    mode: Mode,
    memory: Option<Arc<dyn Memory>>,
    budget: Budget,
    /// Since the job began; read from memory at the first question.
    spent: Mutex<Option<Usage>>,
}

/// A question with the places of the completions it shows, in order.
struct Asked {
    question: Question,
    shown: Vec<usize>,
}

/// What became of a question.
struct Answer {
    verdict: Option<Verdict>,
    exchange: Exchange,
}

impl JudgeReward {
    /// A judge with its way of asking.
    pub fn new(
        judge: Box<dyn Judge>,
        template: Template,
        mode: Mode,
        memory: Option<Arc<dyn Memory>>,
        budget: Budget,
    ) -> Self {
        Self { judge, template, mode, memory, budget, spent: Mutex::new(None) }
    }

    /// Replies, from memory where the same was asked before. What cannot be understood is asked once more.
    fn ask(&self, asked: &[Asked]) -> Result<Vec<Answer>, RewardError> {
        let keys: Vec<String> = asked.iter().map(|a| self.key(&a.question)).collect();
        let known = match &self.memory {
            Some(memory) => memory.recall(&keys)?,
            None => vec![None; keys.len()],
        };
        // What was remembered is settled, readable or not, and is not paid for again.
        let settled = |(kept, a): (Option<CachedReply>, &Asked)| {
            let CachedReply { reply: raw, usage } = kept?;
            Some(Reply { verdict: understand(a.question.kind, &raw), raw, usage })
        };
        let mut replies: Vec<Option<Reply>> = known.into_iter().zip(asked).map(settled).collect();
        // The same question twice, as when two answers are the same, is one question.
        let first: Vec<usize> = keys.iter().map(|key| keys.iter().position(|k| k == key).unwrap_or_default()).collect();
        let mut open: Vec<usize> = (0..asked.len()).filter(|&i| replies[i].is_none() && first[i] == i).collect();
        for last in [false, true] {
            if open.is_empty() {
                break;
            }
            let fresh = self.pay(&open.iter().map(|&i| asked[i].question.clone()).collect::<Vec<_>>(), |fresh| {
                let settled = open.iter().zip(fresh).filter(|(_, r)| last || r.verdict.is_some());
                settled.map(|(&i, r)| (keys[i].clone(), CachedReply { reply: r.raw.clone(), usage: r.usage })).collect()
            })?;
            open.iter().zip(fresh).for_each(|(&i, reply)| replies[i] = Some(reply));
            open.retain(|&i| replies[i].as_ref().is_some_and(|r| r.verdict.is_none()));
        }
        for i in 0..asked.len() {
            if replies[i].is_none() {
                replies[i] = replies[first[i]].clone();
            }
        }
        let lost = || Reply { raw: String::new(), verdict: None, usage: Usage::default() };
        let answer = |(reply, asked): (Option<Reply>, &Asked)| {
            let Reply { raw, verdict, usage } = reply.unwrap_or_else(lost);
            let exchange = Exchange {
                judge: self.judge.id().into(),
                template: self.template.id().into(),
                shown: asked.shown.iter().map(|&i| i as u32).collect(),
                reply: raw,
                first: verdict.as_ref().and_then(Verdict::first),
                usage,
            };
            Answer { verdict, exchange }
        };
        Ok(replies.into_iter().zip(asked).map(answer).collect())
    }

    /// Asks the judge within its budget, and keeps what it said together with what it cost.
    fn pay(
        &self,
        questions: &[Question],
        keep: impl Fn(&[Reply]) -> Vec<(String, CachedReply)>,
    ) -> Result<Vec<Reply>, RewardError> {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = match (*spent, &self.memory) {
            (Some(total), _) => total,
            (None, Some(memory)) => memory.spent()?,
            (None, None) => Usage::default(),
        };
        if let Some((spent, key)) = self.budget.exceeded(&total, questions.len() as u64) {
            return Err(RewardError::Budget { name: self.judge.id().into(), spent, key });
        }
        let replies = self.judge.ask(questions)?;
        let mut now = Usage::default();
        replies.iter().for_each(|r| now += r.usage);
        if let Some(memory) = &self.memory {
            memory.remember(keep(&replies), now)?;
        }
        total += now;
        *spent = Some(total);
        Ok(replies)
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
        let ask = |a: usize, b: usize| Asked { question: self.template.pair(&group[a], &group[b]), shown: vec![a, b] };
        let mut questions: Vec<Asked> = Vec::new();
        for &(a, b) in &pairs {
            questions.push(ask(a, b));
            if orders != Orders::First {
                questions.push(ask(b, a));
            }
        }
        let mut replies = self.ask(&questions)?.into_iter();
        let mut wins = vec![0.0; group.len()];
        let mut reasons = vec![Vec::new(); group.len()];
        let mut exchanges = vec![Vec::new(); group.len()];
        for &(a, b) in &pairs {
            let said: Vec<Answer> = replies.by_ref().take(if orders == Orders::First { 1 } else { 2 }).collect();
            let first = |at: usize| said.get(at)?.verdict.as_ref()?.first();
            let unreadable = said.iter().filter(|r| r.verdict.is_none()).count();
            let shown_first = first(0).unwrap_or(0.5);
            let shown_second = if orders == Orders::First { shown_first } else { 1.0 - first(1).unwrap_or(0.5) };
            let both = BothOrders { shown_first, shown_second };
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
            exchanges[a].extend(said.into_iter().map(|s| s.exchange));
        }
        let others = (group.len() - 1).max(1) as f64;
        let name = self.judge.id();
        let judged = |((wins, reasons), exchanges): ((f64, Vec<String>), Vec<Exchange>)| Judged {
            score: wins / others,
            reason: format!("{name}: {}", reasons.join("; ")),
            exchanges,
        };
        Ok(wins.into_iter().zip(reasons).zip(exchanges).map(judged).collect())
    }

    /// Scores of the completions of one prompt by their places, in the order they come in and in reverse.
    fn rank(&self, group: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let n = group.len();
        let orders = [(0..n).collect::<Vec<_>>(), (0..n).rev().collect()];
        let asked = orders.map(|shown| {
            let answers: Vec<&Sample> = shown.iter().map(|&i| &group[i]).collect();
            Asked { question: self.template.ranking(&answers), shown }
        });
        let answers = if n > 1 { self.ask(&asked)? } else { Vec::new() };
        let (mut sums, mut read) = (vec![0.0; n], 0.0);
        for answer in &answers {
            if let Some(Verdict::Ranking(shares)) = &answer.verdict {
                read += 1.0;
                answer.exchange.shown.iter().zip(shares).for_each(|(&i, share)| sums[i as usize] += share);
            }
        }
        let mut judged: Vec<Judged> = sums
            .into_iter()
            .map(|sum| {
                let score = if read > 0.0 { sum / read } else { 0.5 };
                Judged::new(score, format!("{}: beats {score:.3} of the others, by {read} rankings", self.judge.id()))
            })
            .collect();
        if let Some(first) = judged.first_mut() {
            first.exchanges = answers.into_iter().map(|a| a.exchange).collect();
        }
        Ok(judged)
    }

    fn grades(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let asked: Vec<Asked> = samples
            .chunk_by(same_prompt)
            .flat_map(|group| group.iter().enumerate())
            .map(|(place, s)| Asked { question: self.template.grade(s), shown: vec![place] })
            .collect();
        let judged = |answer: Answer| {
            let reply = answer.exchange.reply.clone();
            let (score, reason) = match answer.verdict {
                Some(Verdict::Grade(grade)) => (grade, reply),
                // The middle of the scale: nothing is known.
                _ => (5.5, format!("unreadable: {reply}")),
            };
            Judged { score, reason, exchanges: vec![answer.exchange] }
        };
        Ok(self.ask(&asked)?.into_iter().map(judged).collect())
    }
}

/// Whether two samples, side by side, answer the same prompt.
pub(crate) fn same_prompt(a: &Sample, b: &Sample) -> bool {
    a.ids.prompt == b.ids.prompt && a.prompt == b.prompt && a.row == b.row
}

impl Reward for JudgeReward {
    fn name(&self) -> &str {
        self.judge.id()
    }

    fn is_relative(&self) -> bool {
        self.mode != Mode::Grade
    }

    fn timeout(&self) -> Option<Duration> {
        self.judge.patience()
    }

    fn placements(&self) -> Vec<Placement> {
        self.judge.occupies()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let groups = || samples.chunk_by(same_prompt);
        let together = |all: Result<Vec<Vec<Judged>>, RewardError>| Ok(all?.concat());
        match self.mode {
            Mode::Grade => self.grades(samples),
            Mode::Ranking => together(groups().map(|group| self.rank(group)).collect()),
            Mode::Pairwise(orders) => together(groups().map(|group| self.compare(group, orders)).collect()),
        }
    }
}

#[cfg(test)]
mod tests;
