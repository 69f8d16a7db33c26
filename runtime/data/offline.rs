//! Rows of offline algorithms: read from files, checked, tokenized, counted.

use std::path::Path;

use rehearsal_actors::{MaskedSequence, Ranking, Tokens};
use rehearsal_lm::{Architecture, Text};

use super::demonstrations;
use super::dropped::{Dropped, Unusable};
use super::ledger::Shape;
use super::preferences::{self, PairRow};
use super::rows::{self, Row};
use super::settings::{DataSettings, OnBad, OnLong, PromptsSettings};
use super::shuffle::order;
use super::tokenize::RowTokenizer;
use crate::error::{Error, Result};

/// Every so many rows one is held out, where no file is named for it.
const HELD_OUT_EVERY: usize = 10;

/// Training rows and held-out rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows<T> {
    /// Rows to train on.
    pub train: Vec<T>,
    /// Rows for evaluation.
    pub held_out: Vec<T>,
}

impl<T> Rows<T> {
    /// Training rows of draws `cursor .. cursor + n`, with their indices.
    pub fn draw(&self, seed: u64, cursor: u64, n: usize) -> Vec<(usize, &T)> {
        order(seed, cursor, n, self.train.len()).into_iter().map(|i| (i, &self.train[i])).collect()
    }

    /// Counts and a hash of all rows; independent of file names.
    pub fn fingerprint(&self) -> String
    where
        T: Content,
    {
        let mut hasher = blake3::Hasher::new();
        self.train.iter().chain(&self.held_out).for_each(|row| row.hash(&mut hasher));
        format!("{} + {} held out, {}", self.train.len(), self.held_out.len(), &hasher.finalize().to_hex()[..16])
    }
}

/// A row whose content can be hashed.
pub trait Content {
    /// Adds everything that is learned from.
    fn hash(&self, hasher: &mut blake3::Hasher);

    /// Its largest token.
    fn largest_token(&self) -> u32;

    /// The token sequences that are learned from, each a prompt with a completion.
    fn sequences(&self) -> Vec<Vec<u32>>;
}

fn joined<'a>(all: impl Iterator<Item = &'a Tokens>) -> Vec<Vec<u32>> {
    all.map(|tokens| [tokens.prompt.as_slice(), tokens.completion.as_slice()].concat()).collect()
}

fn largest<'a>(all: impl Iterator<Item = &'a Tokens>) -> u32 {
    all.flat_map(|tokens| tokens.prompt.iter().chain(tokens.completion.iter())).copied().max().unwrap_or(0)
}

fn hash_tokens(hasher: &mut blake3::Hasher, tokens: &[u32]) {
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.update(b"\0");
}

impl Content for MaskedSequence {
    fn hash(&self, hasher: &mut blake3::Hasher) {
        hash_tokens(hasher, &self.tokens);
        hasher.update(&self.loss_mask.iter().map(|m| u8::from(*m)).collect::<Vec<_>>());
    }

    fn largest_token(&self) -> u32 {
        self.tokens.iter().copied().max().unwrap_or(0)
    }

    fn sequences(&self) -> Vec<Vec<u32>> {
        vec![self.tokens.to_vec()]
    }
}

impl Content for PairRow {
    fn hash(&self, hasher: &mut blake3::Hasher) {
        for tokens in [&self.chosen, &self.rejected] {
            hash_tokens(hasher, &tokens.prompt);
            hash_tokens(hasher, &tokens.completion);
        }
        hasher.update(&self.score_gap.unwrap_or(0.0).to_le_bytes());
    }

    fn largest_token(&self) -> u32 {
        largest([&self.chosen, &self.rejected].into_iter())
    }

    fn sequences(&self) -> Vec<Vec<u32>> {
        joined([&self.chosen, &self.rejected].into_iter())
    }
}

impl Content for Ranking {
    fn hash(&self, hasher: &mut blake3::Hasher) {
        for (tokens, rank) in self.completions.iter().zip(&self.ranks) {
            hash_tokens(hasher, &tokens.prompt);
            hash_tokens(hasher, &tokens.completion);
            hasher.update(&rank.to_le_bytes());
        }
        hasher.update(&self.margin.unwrap_or(0.0).to_le_bytes());
        hasher.update(&self.probability.unwrap_or(1.0).to_le_bytes());
    }

    fn largest_token(&self) -> u32 {
        largest(self.completions.iter())
    }

    fn sequences(&self) -> Vec<Vec<u32>> {
        joined(self.completions.iter())
    }
}

/// Reads files of rows for one model.
pub struct RowReader<'a> {
    data: &'a DataSettings,
    /// Whether rows are held out for evaluation.
    evaluates: bool,
    tokenizer: RowTokenizer<'a>,
    /// Rows left out so far.
    pub dropped: Dropped,
}

impl<'a> RowReader<'a> {
    /// A reader that tokenizes with a model's tokenizer and chat template.
    pub fn new(
        data: &'a DataSettings,
        prompts: &'a PromptsSettings,
        evaluates: bool,
        text: &'a Text,
        architecture: &'a Architecture,
    ) -> Self {
        let limit = match data.tokens_max {
            0 => architecture.context,
            n => n.min(architecture.context),
        };
        let tokenizer = RowTokenizer {
            text,
            eos: &architecture.eos,
            chat: prompts.chat,
            system: prompts.system.as_deref(),
            tokens_max: limit,
            truncate: data.on_long == OnLong::Truncate,
        };
        Self { data, evaluates, tokenizer, dropped: Dropped::default() }
    }

    /// Demonstrations to train on and to evaluate with.
    pub fn demonstrations(&mut self) -> Result<Rows<MaskedSequence>> {
        self.rows(demonstrations::read, Shape::Demonstrations)
    }

    /// Preference pairs to train on and to evaluate with.
    pub fn pairs(&mut self) -> Result<Rows<PairRow>> {
        self.rows(preferences::pair, Shape::Pairs)
    }

    /// Rankings to train on and to evaluate with.
    pub fn rankings(&mut self) -> Result<Rows<Ranking>> {
        self.rows(preferences::ranking, Shape::Rankings)
    }

    /// The demonstrations of another file.
    pub fn demonstrations_of(&mut self, file: &Path) -> Result<Vec<MaskedSequence>> {
        self.read(file, &demonstrations::read, Shape::Demonstrations)
    }

    fn rows<T>(
        &mut self,
        parse: fn(&Row, &RowTokenizer<'_>) -> std::result::Result<T, Unusable>,
        shape: Shape,
    ) -> Result<Rows<T>> {
        let data = self.data;
        let mut train = Vec::new();
        for file in &data.train {
            train.extend(self.read(file, &parse, shape)?);
        }
        let mut held_out = match &data.held_out {
            Some(file) => self.read(file, &parse, shape)?,
            None if self.evaluates => {
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
        file: &Path,
        parse: &dyn Fn(&Row, &RowTokenizer<'_>) -> std::result::Result<T, Unusable>,
        shape: Shape,
    ) -> Result<Vec<T>> {
        let data = self.data;
        let mut usable = Vec::new();
        for row in rows::open(file, shape)? {
            let row = row?;
            let error = |reason: String, key: &str| Error::Prompts {
                file: file.into(),
                message: format!("{}: {reason}; set `data.{key} = \"skip\"` to leave such rows out", row.place),
            };
            match parse(&row, &self.tokenizer) {
                Ok(row) => usable.push(row),
                Err(Unusable::Bad(reason)) if data.on_bad_row == OnBad::Skip => self.dropped.add(reason, &row.place),
                Err(Unusable::Bad(reason)) => return Err(error(reason, "on_bad_row")),
                Err(Unusable::Long { tokens }) => {
                    let limit = self.tokenizer.tokens_max;
                    if data.on_long == OnLong::Fail {
                        return Err(error(format!("has {tokens} tokens and may have {limit}"), "on_long"));
                    }
                    self.dropped.add(format!("is longer than {limit} tokens"), &row.place);
                }
            }
        }
        if usable.is_empty() {
            let reasons = self.dropped.summary();
            let message = format!("no row can be used{}{reasons}", if reasons.is_empty() { "" } else { ": " });
            return Err(Error::Prompts { file: file.into(), message });
        }
        Ok(usable)
    }
}
