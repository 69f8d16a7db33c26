//! Two models on the same prompts, compared by whatever knows better.

use std::sync::Arc;

use rehearsal_actors::{Reward, Sample, Tokens};
use rehearsal_learn::evaluation::winrate::{LengthControlled, WinRate, bootstrap, length_controlled};
use rehearsal_lm::generate::{Completion, Generator, Options, Request, Sampling, completion_text};
use rehearsal_lm::random::{Region, Stream};
use rehearsal_lm::{Checkpoint, Message, Precision};
use serde::Serialize;

use crate::error::Result;

/// How two models meet.
#[derive(Debug, Clone)]
pub struct Contest {
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f64,
    pub seed: u64,
    pub dtype: Precision,
    /// A difference of scores up to this is a tie.
    pub tie: f64,
    /// Confidence of the interval.
    pub confidence: f64,
}

/// What became of one prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptResult {
    pub prompt: String,
    pub first: String,
    pub second: String,
    pub first_score: f64,
    pub second_score: f64,
    pub first_tokens: usize,
    pub second_tokens: usize,
    pub reason: String,
}

/// The first model against the second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    pub by: String,
    pub prompts: usize,
    pub win: f64,
    pub tie: f64,
    pub loss: f64,
    /// Wins and half the ties.
    pub win_rate: f64,
    /// Bootstrap interval of it.
    pub interval: (f64, f64),
    pub confidence: f64,
    /// The rate at equal lengths; none where lengths never differ.
    pub length_controlled: Option<f64>,
    pub first_tokens: f64,
    pub second_tokens: f64,
    pub first_score: f64,
    pub second_score: f64,
    pub results: Vec<PromptResult>,
}

/// Both models answer every prompt; `reward` scores the two answers side by side.
pub fn compare(
    models: [&Checkpoint; 2],
    prompts: &[Vec<Message>],
    reward: &dyn Reward,
    contest: &Contest,
) -> Result<ModelReport> {
    let [first, second] = [answers(models[0], prompts, contest)?, answers(models[1], prompts, contest)?];
    let mut samples = Vec::new();
    for (i, messages) in prompts.iter().enumerate() {
        // Both are judged in the words of the first model's tokenizer; the prompt tells them apart from their neighbours.
        let ids = Arc::new(models[0].text.encode_chat(messages)?);
        for (text, answer) in [&first[i], &second[i]] {
            samples.push(Sample {
                prompt: messages.last().map(|m| m.content.clone()).unwrap_or_default(),
                messages: Arc::new(messages.clone()),
                completion: text.clone(),
                tokens: answer.tokens.len(),
                ids: Tokens { prompt: ids.clone(), completion: Arc::new(answer.tokens.clone()) },
                finish: answer.finish,
                answer: None,
                row: i as u64,
            });
        }
    }
    let judged = reward.score(&samples).map_err(rehearsal_actors::Error::from)?;
    let results: Vec<PromptResult> = judged
        .as_chunks::<2>()
        .0
        .iter()
        .zip(samples.as_chunks::<2>().0)
        .map(|([a, b], [x, y])| PromptResult {
            prompt: x.prompt.clone(),
            first: x.completion.clone(),
            second: y.completion.clone(),
            first_score: a.score,
            second_score: b.score,
            first_tokens: x.tokens,
            second_tokens: y.tokens,
            reason: a.reason.clone(),
        })
        .collect();
    let verdict = |r: &PromptResult| match r.first_score - r.second_score {
        gap if gap > contest.tie => 1i8,
        gap if gap < -contest.tie => -1,
        _ => 0,
    };
    let verdicts: Vec<i8> = results.iter().map(verdict).collect();
    let points: Vec<f64> = verdicts.iter().map(|&v| 0.5 + 0.5 * f64::from(v)).collect();
    let rate = WinRate::of(&verdicts);
    let stream = Stream::in_region(contest.seed, Region::WinRateBootstrap, 0);
    let differences: Vec<f64> = results.iter().map(|r| r.first_tokens as f64 - r.second_tokens as f64).collect();
    let mean = |of: fn(&PromptResult) -> f64| results.iter().map(of).sum::<f64>() / results.len().max(1) as f64;
    Ok(ModelReport {
        by: reward.name().into(),
        prompts: results.len(),
        win: rate.win,
        tie: rate.tie,
        loss: rate.loss,
        win_rate: rate.rate(0.5),
        interval: bootstrap(&points, contest.confidence, 2000, |n| stream.uniform(n)),
        confidence: contest.confidence,
        // A little ridge keeps preferences that lengths separate finite.
        length_controlled: length_controlled(&points, &differences, 1e-3).map(|LengthControlled { rate, .. }| rate),
        first_tokens: mean(|r| r.first_tokens as f64),
        second_tokens: mean(|r| r.second_tokens as f64),
        first_score: mean(|r| r.first_score),
        second_score: mean(|r| r.second_score),
        results,
    })
}

/// A model's answers, in order, with the same random numbers for every model.
fn answers(model: &Checkpoint, prompts: &[Vec<Message>], contest: &Contest) -> Result<Vec<(String, Completion)>> {
    let decoder = model.frozen(&candle_core::Device::Cpu, contest.dtype.dtype())?;
    let request = |(i, messages): (usize, &Vec<Message>)| {
        Ok(Request { id: i as u64, prompt: Arc::new(model.text.encode_chat(messages)?) })
    };
    let requests = prompts.iter().enumerate().map(request).collect::<Result<Vec<_>>>()?;
    let options = Options {
        sampling: Sampling { temperature: contest.temperature, ..Sampling::default() },
        max_new_tokens: contest.max_new_tokens,
        min_new_tokens: 0,
        eos: model.architecture.eos.clone(),
        stop: Vec::new(),
        seed: contest.seed,
        batch: 32,
    };
    let mut said: Vec<Option<Completion>> = vec![None; prompts.len()];
    Generator::new(&decoder)?.generate(requests, &options, None, &|| false, &mut |c| {
        let at = c.id as usize;
        said[at] = Some(c);
    })?;
    said.into_iter().flatten().map(|c| Ok((completion_text(&model.text, &c.tokens, &[])?, c))).collect()
}
