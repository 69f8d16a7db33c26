//! Training data: rows of files in TRL's columns, validated and tokenised, drawn in an order that is a function of the
//! seed. Rows that are left out are counted by reason.

pub mod columns;
mod demonstrations;
mod dropped;
pub mod ledger;
pub mod preferences;
mod prompts;
pub mod rows;
mod shuffle;
mod tokenize;
pub mod write;

use rehearsal_actors::{Marked, Ranking};
use rehearsal_lm::{Architecture, Text};

pub use dropped::{Dropped, DroppedRows};
pub use preferences::PairRow;
pub use prompts::{PromptRow, Prompts};
pub use shuffle::order;

use crate::config::methods::{Algorithm, OnLong};
use crate::config::{Config, OnBad};
use crate::error::{Error, Result};
use columns::{TextOrMessages, text_or_messages};
use dropped::Unusable;
use ledger::Shape;
use rows::Row;
use tokenize::RowTokenizer;

/// Interval of the rows that are held out for evaluation if no file is configured for it.
const HELD_OUT_EVERY: usize = 10;

/// Training rows and held-out rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows<T> {
    pub train: Vec<T>,
    pub held_out: Vec<T>,
}

impl<T> Rows<T> {
    /// Training rows of draws `cursor .. cursor + n`, with their indices.
    pub fn draw(&self, seed: u64, cursor: u64, n: usize) -> Vec<(usize, &T)> {
        order(seed, cursor, n, self.train.len()).into_iter().map(|i| (i, &self.train[i])).collect()
    }

    fn hash(&self, mut one: impl FnMut(&mut blake3::Hasher, &T)) -> String {
        let mut hasher = blake3::Hasher::new();
        self.train.iter().chain(&self.held_out).for_each(|row| one(&mut hasher, row));
        format!("{} + {} held out, {}", self.train.len(), self.held_out.len(), &hasher.finalize().to_hex()[..16])
    }
}

/// Data of an offline algorithm.
#[derive(Debug, Clone)]
pub enum Data {
    Demonstrations(Rows<Marked>),
    Pairs(Rows<PairRow>),
    Rankings(Rows<Ranking>),
}

impl Data {
    /// Reads the data of the configured algorithm; `None` for an online one.
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

    /// Number of training rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Demonstrations(rows) => rows.train.len(),
            Self::Pairs(rows) => rows.train.len(),
            Self::Rankings(rows) => rows.train.len(),
        }
    }

    /// Counts and a hash of all rows; independent of file names.
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
                h.update(&row.marks.iter().map(|m| u8::from(*m)).collect::<Vec<_>>());
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

/// Reads demonstrations of a file beside the job's data: pretraining text, or demonstrations to normalise a reward
/// model on.
pub fn demonstrations(
    config: &Config,
    file: &std::path::Path,
    text: &Text,
    architecture: &Architecture,
) -> Result<Vec<Marked>> {
    Loader::new(config, text, architecture).read(file, &demonstrations::read, Shape::Demonstrations)
}

/// Reads labelled pairs for an evaluation. Unusable rows are counted; having no usable row is an error.
pub fn labelled_pairs(file: &std::path::Path, text: &Text, architecture: &Architecture) -> Result<LabelledPairs> {
    let (eos, tokens_max) = (architecture.eos.as_slice(), architecture.context);
    let tokenizer = RowTokenizer { text, eos, chat: true, system: None, tokens_max, truncate: true };
    let (mut pairs, mut dropped) = (Vec::new(), 0);
    for row in rows::open(file, Shape::Pairs)? {
        let row = row?;
        match preferences::pair(&row, &tokenizer) {
            Ok(pair) => pairs.push((row.columns["subset"].as_str().map(String::from), pair)),
            Err(_) => dropped += 1,
        }
    }
    if pairs.is_empty() {
        let message = format!("no row can be used ({dropped} bad); rows need `prompt`, `chosen` and `rejected`");
        return Err(Error::Prompts { file: file.into(), message });
    }
    Ok(LabelledPairs { pairs, dropped })
}

/// Labelled pairs, each with the value of its column `subset`.
pub struct LabelledPairs {
    pub pairs: Vec<(Option<String>, PairRow)>,
    /// Number of unusable rows.
    pub dropped: u64,
}

/// Reads the prompts of a file as conversations; a plain text is one message of the user.
pub fn prompts_of(file: &std::path::Path) -> Result<Vec<Vec<rehearsal_lm::Message>>> {
    rows::open(file, Shape::Verdicts)?
        .map(|row| {
            let row = row?;
            match text_or_messages(&row.columns, "prompt") {
                Ok(TextOrMessages::Text(text)) => Ok(vec![rehearsal_lm::Message::user(text)]),
                Ok(TextOrMessages::Messages(messages)) => Ok(messages),
                Err(e) => Err(Error::Prompts { file: file.into(), message: format!("{}: {e}", row.place) }),
            }
        })
        .collect()
}

/// Reads files into rows of one kind.
struct Loader<'a> {
    config: &'a Config,
    tokenizer: RowTokenizer<'a>,
    dropped: Dropped,
}

impl<'a> Loader<'a> {
    fn new(config: &'a Config, text: &'a Text, architecture: &'a Architecture) -> Self {
        let limit = match config.data.tokens_max {
            0 => architecture.context,
            n => n.min(architecture.context),
        };
        let tokenizer = RowTokenizer {
            text,
            eos: &architecture.eos,
            chat: config.prompts.chat,
            system: config.prompts.system.as_deref(),
            tokens_max: limit,
            truncate: config.data.on_long == OnLong::Truncate,
        };
        Self { config, tokenizer, dropped: Dropped::default() }
    }

    fn rows<T>(
        &mut self,
        parse: fn(&Row, &RowTokenizer<'_>) -> std::result::Result<T, Unusable>,
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
        parse: &dyn Fn(&Row, &RowTokenizer<'_>) -> std::result::Result<T, Unusable>,
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
