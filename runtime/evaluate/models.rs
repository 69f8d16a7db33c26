//! Win rate of one model against another on the same prompts, by a reward.

use std::sync::Arc;

use rehearsal_actors::{Reward, Sample, Tokens};
use rehearsal_learn::evaluation::winrate::{LengthControlled, WinRate, bootstrap, length_controlled};
use rehearsal_lm::generate::{Completion, Generator, Options, Request, Sampling, completion_text};
use rehearsal_lm::random::Stream;
use rehearsal_lm::{Checkpoint, Message, Precision};
use serde::Serialize;

use crate::error::Result;

/// Settings of a comparison.
#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// Longest completion in tokens.
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy decoding.
    pub temperature: f64,
    /// Seed of sampling and bootstrap.
    pub seed: u64,
    /// Type that the models compute in.
    pub dtype: Precision,
    /// Largest difference of scores that is a tie.
    pub tie: f64,
    /// Confidence level of the interval, from 0 to 1.
    pub confidence: f64,
}

/// Completions and scores of one prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptResult {
    /// Text of the last message.
    pub prompt: String,
    /// Completion of the first model.
    pub first: String,
    /// Completion of the second model.
    pub second: String,
    /// Score of the first completion.
    pub first_score: f64,
    /// Score of the second completion.
    pub second_score: f64,
    /// Tokens of the first completion.
    pub first_tokens: usize,
    /// Tokens of the second completion.
    pub second_tokens: usize,
    /// The reward's reason for the first score.
    pub reason: String,
}

/// Result of a comparison, from the first model's side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// Name of the reward.
    pub by: String,
    /// Number of prompts.
    pub prompts: usize,
    /// Share of prompts.
    pub win: f64,
    /// Share of prompts whose scores differ by at most `tie`.
    pub tie: f64,
    /// Share of prompts on which the second model's score is higher.
    pub loss: f64,
    /// Wins plus half the ties.
    pub win_rate: f64,
    /// Bootstrap confidence interval of `win_rate`.
    pub interval: (f64, f64),
    /// Confidence level of `interval`, from 0 to 1.
    pub confidence: f64,
    /// Win rate at equal lengths; `None` if lengths never differ.
    pub length_controlled: Option<f64>,
    /// Mean length of the first model's completions; likewise below.
    pub first_tokens: f64,
    /// Mean length of the second model's completions, in tokens.
    pub second_tokens: f64,
    /// Mean score.
    pub first_score: f64,
    /// Mean score of the second model's completions.
    pub second_score: f64,
    /// One entry for each prompt.
    pub results: Vec<PromptResult>,
}

/// Generates a completion of every prompt by both models and scores each two side by side by `reward`.
pub fn compare(
    models: [&Checkpoint; 2],
    prompts: &[Vec<Message>],
    reward: &dyn Reward,
    options: &CompareOptions,
) -> Result<ModelReport> {
    let [first, second] = [generate(models[0], prompts, options)?, generate(models[1], prompts, options)?];
    let mut samples = Vec::new();
    for (i, messages) in prompts.iter().enumerate() {
        // Prompt ids of the first model's tokenizer for both: a reward groups samples by their prompt.
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
        gap if gap > options.tie => 1i8,
        gap if gap < -options.tie => -1,
        _ => 0,
    };
    let verdicts: Vec<i8> = results.iter().map(verdict).collect();
    let points: Vec<f64> = verdicts.iter().map(|&v| 0.5 + 0.5 * f64::from(v)).collect();
    let rate = WinRate::of(&verdicts);
    let stream = Stream::new(options.seed, u64::MAX);
    let differences: Vec<f64> = results.iter().map(|r| r.first_tokens as f64 - r.second_tokens as f64).collect();
    let mean = |of: fn(&PromptResult) -> f64| results.iter().map(of).sum::<f64>() / results.len().max(1) as f64;
    Ok(ModelReport {
        by: reward.name().into(),
        prompts: results.len(),
        win: rate.win,
        tie: rate.tie,
        loss: rate.loss,
        win_rate: rate.rate(0.5),
        interval: bootstrap(&points, options.confidence, 2000, |n| stream.uniform(n)),
        confidence: options.confidence,
        // The ridge keeps the coefficient finite if lengths separate wins from losses.
        length_controlled: length_controlled(&points, &differences, 1e-3).map(|LengthControlled { rate, .. }| rate),
        first_tokens: mean(|r| r.first_tokens as f64),
        second_tokens: mean(|r| r.second_tokens as f64),
        first_score: mean(|r| r.first_score),
        second_score: mean(|r| r.second_score),
        results,
    })
}

/// A model's completions with their texts, in order. Random numbers are the same for each model.
fn generate(
    model: &Checkpoint,
    prompts: &[Vec<Message>],
    options: &CompareOptions,
) -> Result<Vec<(String, Completion)>> {
    let decoder = model.frozen(&candle_core::Device::Cpu, options.dtype.dtype())?;
    let request = |(i, messages): (usize, &Vec<Message>)| {
        Ok(Request { id: i as u64, prompt: Arc::new(model.text.encode_chat(messages)?) })
    };
    let requests = prompts.iter().enumerate().map(request).collect::<Result<Vec<_>>>()?;
    let sampling = Options {
        sampling: Sampling { temperature: options.temperature, ..Sampling::default() },
        max_new_tokens: options.max_new_tokens,
        min_new_tokens: 0,
        eos: model.architecture.eos.clone(),
        stop: Vec::new(),
        seed: options.seed,
        batch: 32,
    };
    let mut completions: Vec<Option<Completion>> = vec![None; prompts.len()];
    Generator::new(&decoder)?.generate(requests, &sampling, None, &|| false, &mut |c| {
        let at = c.id as usize;
        completions[at] = Some(c);
    })?;
    completions.into_iter().flatten().map(|c| Ok((completion_text(&model.text, &c.tokens, &[])?, c))).collect()
}
