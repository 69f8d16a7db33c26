//! What a job learns from: rows of files in TRL's columns, checked, tokenised and counted, in an order that is a function
//! of the seed.

mod demonstrations;
pub mod encode;
pub mod ledger;
pub mod preferences;
mod prompts;
pub mod rows;
pub mod write;

use std::collections::BTreeMap;

use rehearsal_actors::{MaskedSequence, Ranking};
use rehearsal_lm::random::Stream;
use rehearsal_lm::{Architecture, Text};
use serde::Serialize;

pub use prompts::{PromptRow, Prompts};

use crate::config::methods::{Algorithm, OnLong};
use crate::config::{Config, OnBad};
use crate::error::{Error, Result};
use encode::Encoder;
use ledger::Shape;
pub use preferences::PairRow;
use rows::Row;

/// Streams of random numbers from here upward belong to the order of rows; rollouts count from below.
const ORDER_STREAMS: u64 = 1 << 63;

/// Every so many rows one is kept apart for evaluation, where no file is named for it.
const HELD_OUT_EVERY: usize = 10;

/// Places `cursor .. cursor + n` of an endless sequence of permutations of `total` items.
pub fn order(seed: u64, cursor: u64, n: usize, total: usize) -> Vec<usize> {
    let mut permutation = (u64::MAX, Vec::new());
    (cursor..cursor + n as u64)
        .map(|at| {
            let epoch = at / total as u64;
            if permutation.0 != epoch {
                permutation = (epoch, Stream::new(seed, ORDER_STREAMS + epoch).permutation(total));
            }
            permutation.1[(at % total as u64) as usize]
        })
        .collect()
}

/// What was left out, and why: each reason with its count and the first place it was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Dropped(pub BTreeMap<String, DroppedRows>);

/// Rows left out for one reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DroppedRows {
    pub rows: u64,
    pub first: String,
}

impl Dropped {
    fn add(&mut self, reason: String, place: &str) {
        let entry = self.0.entry(reason).or_default();
        entry.rows += 1;
        if entry.first.is_empty() {
            entry.first = place.to_string();
        }
    }

    /// Adds the prompts that were left out.
    pub fn absorb(&mut self, prompts: &Prompts) {
        for (rows, reason) in [(prompts.bad_lines, "cannot be used"), (prompts.too_long, "is too long")] {
            if rows > 0 {
                self.0.insert(reason.into(), DroppedRows { rows, first: String::new() });
            }
        }
    }

    /// Rows left out.
    pub fn total(&self) -> u64 {
        self.0.values().map(|d| d.rows).sum()
    }
}

/// Rows to train on and rows to evaluate with.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows<T> {
    pub train: Vec<T>,
    pub held_out: Vec<T>,
}

impl<T> Rows<T> {
    /// The `n` training rows after the first `cursor` draws.
    pub fn draw(&self, seed: u64, cursor: u64, n: usize) -> Vec<(usize, &T)> {
        order(seed, cursor, n, self.train.len()).into_iter().map(|i| (i, &self.train[i])).collect()
    }

    fn hash(&self, mut one: impl FnMut(&mut blake3::Hasher, &T)) -> String {
        let mut hasher = blake3::Hasher::new();
        self.train.iter().chain(&self.held_out).for_each(|row| one(&mut hasher, row));
        format!("{} + {} held out, {}", self.train.len(), self.held_out.len(), &hasher.finalize().to_hex()[..16])
    }
}

/// The rows of an offline job.
#[derive(Debug, Clone)]
pub enum Data {
    Demonstrations(Rows<MaskedSequence>),
    Pairs(Rows<PairRow>),
    Rankings(Rows<Ranking>),
}

impl Data {
    /// Reads what a configuration's algorithm learns from.
    pub fn load(config: &Config, text: &Text, architecture: &Architecture) -> Result<(Option<Self>, Dropped)> {
        let mut loader = Loader::new(config, text, architecture);
        let data = match config.job.algorithm {
            Algorithm::Sft => Data::Demonstrations(loader.rows(demonstrations::read, Shape::Demonstrations)?),
            Algorithm::Dpo => Data::Pairs(loader.rows(preferences::pair, Shape::Pairs)?),
            Algorithm::RewardModel => Data::Rankings(loader.rows(preferences::ranking, Shape::Rankings)?),
            _ => return Ok((None, Dropped::default())),
        };
        Ok((Some(data), loader.dropped))
    }

    /// Rows to train on.
    pub fn len(&self) -> usize {
        match self {
            Self::Demonstrations(rows) => rows.train.len(),
            Self::Pairs(rows) => rows.train.len(),
            Self::Rankings(rows) => rows.train.len(),
        }
    }

    /// A hash of what is learned from: equal for equal rows, wherever their files lie.
    pub fn fingerprint(&self) -> String {
        let tokens = |hasher: &mut blake3::Hasher, tokens: &[u32]| {
            for token in tokens {
                hasher.update(&token.to_le_bytes());
            }
            hasher.update(b"\0");
        };
        match self {
            Self::Demonstrations(rows) => rows.hash(|h, row| {
                tokens(h, &row.tokens);
                h.update(&row.loss_mask.iter().map(|m| u8::from(*m)).collect::<Vec<_>>());
            }),
            Self::Pairs(rows) => rows.hash(|h, row| {
                [&row.chosen, &row.rejected].iter().for_each(|t| {
                    tokens(h, &t.prompt);
                    tokens(h, &t.completion);
                });
                h.update(&row.score_gap.unwrap_or(0.0).to_le_bytes());
            }),
            Self::Rankings(rows) => rows.hash(|h, row| {
                for (t, rank) in row.completions.iter().zip(&row.ranks) {
                    tokens(h, &t.prompt);
                    tokens(h, &t.completion);
                    h.update(&rank.to_le_bytes());
                }
                h.update(&row.margin.unwrap_or(0.0).to_le_bytes());
                h.update(&row.probability.unwrap_or(1.0).to_le_bytes());
            }),
        }
    }
}

/// Demonstrations of a file beside a job's data: pretraining text, or what a reward model is normalised on.
pub fn demonstrations(
    config: &Config,
    file: &std::path::Path,
    text: &Text,
    architecture: &Architecture,
) -> Result<Vec<MaskedSequence>> {
    Loader::new(config, text, architecture).read(file, &demonstrations::read, Shape::Demonstrations)
}

/// Pairs of a file for an evaluation.
pub fn labelled_pairs(file: &std::path::Path, text: &Text, architecture: &Architecture) -> Result<LabelledPairs> {
    let (eos, tokens_max) = (architecture.eos.as_slice(), architecture.context);
    let encoder = Encoder { text, eos, chat: true, system: None, tokens_max, truncate: true };
    let (mut pairs, mut dropped) = (Vec::new(), 0);
    for row in rows::open(file, Shape::Pairs)? {
        let row = row?;
        match preferences::pair(&row, &encoder) {
            Ok(pair) => pairs.push((row.columns["subset"].as_str().map(String::from), pair)),
            Err(_) => dropped += 1,
        }
    }
    if pairs.is_empty() {
        let message = format!("no row can be used ({dropped} bad); `prompt`, `chosen` and `rejected` are needed");
        return Err(Error::Prompts { file: file.into(), message });
    }
    Ok(LabelledPairs { pairs, dropped })
}

/// Pairs with their subsets.
pub struct LabelledPairs {
    pub pairs: Vec<(Option<String>, PairRow)>,
    /// Rows that could not be used.
    pub dropped: u64,
}

/// The prompts of a file as conversations.
pub fn prompts_of(file: &std::path::Path) -> Result<Vec<Vec<rehearsal_lm::Message>>> {
    rows::open(file, Shape::Verdicts)?
        .map(|row| {
            let row = row?;
            match encode::said(&row.columns, "prompt") {
                Ok(encode::Said::Text(text)) => Ok(vec![rehearsal_lm::Message::user(text)]),
                Ok(encode::Said::Messages(messages)) => Ok(messages),
                Err(e) => Err(Error::Prompts { file: file.into(), message: format!("{}: {e}", row.place) }),
            }
        })
        .collect()
}

/// Why a row cannot be used.
pub(crate) enum Unusable {
    Bad(String),
    Long { tokens: usize },
}

impl From<String> for Unusable {
    fn from(reason: String) -> Self {
        Self::Bad(reason)
    }
}

/// Reads files into rows of one kind.
struct Loader<'a> {
    config: &'a Config,
    encoder: Encoder<'a>,
    dropped: Dropped,
}

impl<'a> Loader<'a> {
    fn new(config: &'a Config, text: &'a Text, architecture: &'a Architecture) -> Self {
        let limit = match config.data.tokens_max {
            0 => architecture.context,
            n => n.min(architecture.context),
        };
        let encoder = Encoder {
            text,
            eos: &architecture.eos,
            chat: config.prompts.chat,
            system: config.prompts.system.as_deref(),
            tokens_max: limit,
            truncate: config.data.on_long == OnLong::Truncate,
        };
        Self { config, encoder, dropped: Dropped::default() }
    }

    fn rows<T>(
        &mut self,
        parse: fn(&Row, &Encoder<'_>) -> std::result::Result<T, Unusable>,
        shape: Shape,
    ) -> Result<Rows<T>> {
        let data = &self.config.data;
        let mut train = Vec::new();
        for file in &data.train {
            train.extend(self.read(file, &parse, shape)?);
        }
        let mut held_out = match &data.held_out {
            Some(file) => self.read(file, &parse, shape)?,
            None if self.config.evaluation.every_steps > 0 => {
                let (kept, apart): (Vec<_>, Vec<_>) =
                    train.into_iter().enumerate().partition(|(i, _)| (i + 1) % HELD_OUT_EVERY != 0);
                train = kept.into_iter().map(|(_, row)| row).collect();
                apart.into_iter().map(|(_, row)| row).collect()
            }
            None => Vec::new(),
        };
        held_out.truncate(data.held_out_rows);
        Ok(Rows { train, held_out })
    }

    fn read<T>(
        &mut self,
        file: &std::path::Path,
        parse: &dyn Fn(&Row, &Encoder<'_>) -> std::result::Result<T, Unusable>,
        shape: Shape,
    ) -> Result<Vec<T>> {
        let data = &self.config.data;
        let mut usable = Vec::new();
        for row in rows::open(file, shape)? {
            let row = row?;
            let error = |reason: String, key: &str| Error::Prompts {
                file: file.into(),
                message: format!("{}: {reason}; set `data.{key} = \"skip\"` to leave such rows out", row.place),
            };
            match parse(&row, &self.encoder) {
                Ok(row) => usable.push(row),
                Err(Unusable::Bad(reason)) if data.on_bad_row == OnBad::Skip => self.dropped.add(reason, &row.place),
                Err(Unusable::Bad(reason)) => return Err(error(reason, "on_bad_row")),
                Err(Unusable::Long { tokens }) => {
                    let limit = self.encoder.tokens_max;
                    if data.on_long == OnLong::Fail {
                        return Err(error(format!("has {tokens} tokens and may have {limit}"), "on_long"));
                    }
                    self.dropped.add(format!("is longer than {limit} tokens"), &row.place);
                }
            }
        }
        if usable.is_empty() {
            let reasons: Vec<String> =
                self.dropped.0.iter().map(|(reason, d)| format!("{} {reason} ({} first)", d.rows, d.first)).collect();
            let message =
                format!("no row can be used{}{}", if reasons.is_empty() { "" } else { ": " }, reasons.join(", "));
            return Err(Error::Prompts { file: file.into(), message });
        }
        Ok(usable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_wherever_it_is_cut() {
        let at_once = order(1, 0, 30, 10);
        let in_parts: Vec<usize> = (0..30).step_by(3).flat_map(|cursor| order(1, cursor, 3, 10)).collect();
        assert_eq!(at_once, in_parts);
        for epoch in at_once.chunks(10) {
            let mut epoch = epoch.to_vec();
            epoch.sort();
            assert_eq!(epoch, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(at_once[..10], at_once[10..20]);
    }
}
