//! A judge's verdicts as scores.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rehearsal_actors::{Judged, Placement, Reward, RewardError, Sample};
use rehearsal_learn::evaluation::judge::BothOrders;
use rehearsal_store::{CachedReply, Exchange, Usage};

use super::cache::{Budget, ReplyCache};
use super::question::{Judge, Question, Reply};
use super::template::Template;
use super::verdict::JudgeVerdict;
use crate::metrics::Meters;
use crate::metrics::table::sources;

/// Which orders of a pair a judge is shown, and how its verdicts combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Both orders; the score is the mean of their probabilities.
    Average,
    /// Both orders; a win needs both verdicts, anything else is a tie.
    Agree,
    /// The first order alone, which keeps the judge's position bias.
    First,
}

/// What a judge is asked about the completions of one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every pair of completions; the score is the mean share of wins against the others.
    Pairwise(Orders),
    /// All completions at once, in order and in reverse; the score is the share of the others that a completion beats.
    Ranking,
    /// Each completion alone; the score is a grade from 1 to 10.
    Grade,
}

/// Scores completions by a [`Judge`], with replies cached and spending bounded.
pub struct JudgeReward {
    judge: Box<dyn Judge>,
    template: Template,
    mode: Mode,
    cache: Option<Arc<dyn ReplyCache>>,
    budget: Budget,
    /// Total usage since the job began; `None` until the cache is read for the first question.
    spent: Mutex<Option<Usage>>,
    meters: Option<Arc<Meters>>,
}

/// A question and the completions that it shows, as indices in display order.
struct ShownQuestion {
    question: Question,
    shown: Vec<usize>,
}

/// A parsed reply and its record for the ledger.
struct RecordedReply {
    verdict: Option<JudgeVerdict>,
    exchange: Exchange,
}

impl JudgeReward {
    /// Without a cache, every question is sent and the budget starts at zero.
    pub fn new(
        judge: Box<dyn Judge>,
        template: Template,
        mode: Mode,
        cache: Option<Arc<dyn ReplyCache>>,
        budget: Budget,
    ) -> Self {
        Self { judge, template, mode, cache, budget, spent: Mutex::new(None), meters: None }
    }

    /// Exports what the judge does.
    pub(crate) fn with_meters(self, meters: Arc<Meters>) -> Self {
        Self { meters: Some(meters), ..self }
    }

    fn meter(&self, set: impl FnOnce(&Meters)) {
        if let Some(meters) = &self.meters {
            set(meters);
        }
    }

    /// Replies to all questions, from the cache where it has them. A reply without a verdict is asked for once more.
    fn ask(&self, asked: &[ShownQuestion]) -> Result<Vec<RecordedReply>, RewardError> {
        let keys: Vec<String> = asked.iter().map(|a| self.key(&a.question)).collect();
        let cached = match &self.cache {
            Some(cache) => cache.recall(&keys)?,
            None => vec![None; keys.len()],
        };
        // A cached reply is final even if it has no verdict: asking again would be paid for again.
        let parsed = |(kept, a): (Option<CachedReply>, &ShownQuestion)| {
            let CachedReply { reply: raw, usage } = kept?;
            Some(Reply { verdict: self.judge.verdict(a.question.kind, &raw), raw, usage })
        };
        let mut replies: Vec<Option<Reply>> = cached.into_iter().zip(asked).map(parsed).collect();
        let known = replies.iter().flatten().count() as u64;
        self.meter(|meters| meters.count(sources::JUDGE_REPLIES, "cached", known));
        // Equal completions give equal questions, of which only the first is sent.
        let first: Vec<usize> = keys.iter().map(|key| keys.iter().position(|k| k == key).unwrap_or_default()).collect();
        let mut open: Vec<usize> = (0..asked.len()).filter(|&i| replies[i].is_none() && first[i] == i).collect();
        for last in [false, true] {
            if open.is_empty() {
                break;
            }
            let fresh = self.send(&open.iter().map(|&i| asked[i].question.clone()).collect::<Vec<_>>(), |fresh| {
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
        let empty = || Reply { raw: String::new(), verdict: None, usage: Usage::default() };
        let recorded = |(reply, asked): (Option<Reply>, &ShownQuestion)| {
            let Reply { raw, verdict, usage } = reply.unwrap_or_else(empty);
            let exchange = Exchange {
                judge: self.judge.id().into(),
                template: self.template.id().into(),
                shown: asked.shown.iter().map(|&i| i as u32).collect(),
                reply: raw,
                first: verdict.as_ref().and_then(JudgeVerdict::first),
                usage,
            };
            RecordedReply { verdict, exchange }
        };
        Ok(replies.into_iter().zip(asked).map(recorded).collect())
    }

    /// Sends questions to the judge within its budget. The entries that `to_cache` makes of the replies are stored
    /// together with the usage.
    fn send(
        &self,
        questions: &[Question],
        to_cache: impl Fn(&[Reply]) -> Vec<(String, CachedReply)>,
    ) -> Result<Vec<Reply>, RewardError> {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = match (*spent, &self.cache) {
            (Some(total), _) => total,
            (None, Some(cache)) => cache.spent()?,
            (None, None) => Usage::default(),
        };
        if let Some((spent, key)) = self.budget.exceeded(&total, questions.len() as u64) {
            return Err(RewardError::Budget { name: self.judge.id().into(), spent, key });
        }
        let start = Instant::now();
        let replies = self.judge.ask(questions).inspect_err(|_| {
            self.meter(|meters| meters.count(sources::JUDGE_REPLIES, "failed", 1));
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let mut now = Usage::default();
        replies.iter().for_each(|r| now += r.usage);
        self.meter(|meters| {
            let read = replies.iter().filter(|r| r.verdict.is_some()).count();
            meters.set(sources::JUDGE_SECONDS, seconds);
            meters.count(sources::JUDGE_REPLIES, "read", read as u64);
            meters.count(sources::JUDGE_REPLIES, "unreadable", (replies.len() - read) as u64);
            meters.count(sources::JUDGE_TOKENS, "input", now.input_tokens);
            meters.count(sources::JUDGE_TOKENS, "output", now.output_tokens);
        });
        if let Some(cache) = &self.cache {
            cache.remember(to_cache(&replies), now)?;
        }
        total += now;
        self.meter(|meters| meters.set(sources::JUDGE_COST, total.money));
        *spent = Some(total);
        Ok(replies)
    }

    /// Cache key: a hash of the judge's id, the system message and the user message.
    fn key(&self, question: &Question) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [self.judge.id(), &question.system, &question.text] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// [`Mode::Pairwise`] on the completions of one prompt.
    fn compare(&self, group: &[Sample], orders: Orders) -> Result<Vec<Judged>, RewardError> {
        let pairs: Vec<(usize, usize)> =
            (0..group.len()).flat_map(|i| (i + 1..group.len()).map(move |j| (i, j))).collect();
        let ask = |a: usize, b: usize| ShownQuestion {
            question: self.template.pair(&group[a], &group[b]),
            shown: vec![a, b],
        };
        let mut questions: Vec<ShownQuestion> = Vec::new();
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
            let replies: Vec<RecordedReply> =
                replies.by_ref().take(if orders == Orders::First { 1 } else { 2 }).collect();
            let first = |at: usize| replies.get(at)?.verdict.as_ref()?.first();
            let unreadable = replies.iter().filter(|r| r.verdict.is_none()).count();
            let shown_first = first(0).unwrap_or(0.5);
            let shown_second = if orders == Orders::First { shown_first } else { 1.0 - first(1).unwrap_or(0.5) };
            let both = BothOrders { shown_first, shown_second };
            if orders != Orders::First {
                let agreement = (shown_first - 0.5) * (shown_second - 0.5);
                let result = match (unreadable, agreement) {
                    (0, agreement) if agreement > 0.0 => "agreed",
                    (0, agreement) if agreement < 0.0 => "disagreed",
                    _ => "undecided",
                };
                self.meter(|meters| meters.count(sources::JUDGE_COMPARISONS, result, 1));
            }
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
            exchanges[a].extend(replies.into_iter().map(|r| r.exchange));
        }
        let others = (group.len() - 1).max(1) as f64;
        let name = self.judge.id();
        let judged = |((wins, reasons), exchanges): ((f64, Vec<String>), Vec<Exchange>)| Judged {
            score: wins / others,
            reason: format!("{name}: {}", reasons.join("; ")),
            exchanges,
            skipped: false,
        };
        Ok(wins.into_iter().zip(reasons).zip(exchanges).map(judged).collect())
    }

    /// [`Mode::Ranking`] on the completions of one prompt; 0.5 each if no ranking can be read.
    fn rank(&self, group: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let n = group.len();
        let orders = [(0..n).collect::<Vec<_>>(), (0..n).rev().collect()];
        let asked = orders.map(|shown| {
            let answers: Vec<&Sample> = shown.iter().map(|&i| &group[i]).collect();
            ShownQuestion { question: self.template.ranking(&answers), shown }
        });
        let replies = if n > 1 { self.ask(&asked)? } else { Vec::new() };
        let (mut sums, mut read) = (vec![0.0; n], 0.0);
        for reply in &replies {
            if let Some(JudgeVerdict::Ranking(shares)) = &reply.verdict {
                read += 1.0;
                reply.exchange.shown.iter().zip(shares).for_each(|(&i, share)| sums[i as usize] += share);
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
            first.exchanges = replies.into_iter().map(|r| r.exchange).collect();
        }
        Ok(judged)
    }

    /// [`Mode::Grade`]; 5.5, the middle of the scale, for a reply without a grade.
    fn grades(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let asked: Vec<ShownQuestion> = samples
            .chunk_by(same_prompt)
            .flat_map(|group| group.iter().enumerate())
            .map(|(index, s)| ShownQuestion { question: self.template.grade(s), shown: vec![index] })
            .collect();
        let judged = |reply: RecordedReply| {
            let raw = reply.exchange.reply.clone();
            let (score, reason) = match reply.verdict {
                Some(JudgeVerdict::Grade(grade)) => (grade, raw),
                _ => (5.5, format!("unreadable: {raw}")),
            };
            Judged { score, reason, exchanges: vec![reply.exchange], skipped: false }
        };
        Ok(self.ask(&asked)?.into_iter().map(judged).collect())
    }
}

/// Whether two adjacent samples are completions of the same prompt.
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
        self.judge.timeout()
    }

    fn placements(&self) -> Vec<Placement> {
        self.judge.placements()
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
