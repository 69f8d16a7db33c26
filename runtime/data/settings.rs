//! `[data]` and `[prompts]`.

use std::path::PathBuf;

use crate::config::{Keys, Range, Settings};

/// What becomes of a line, row or prompt that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnBad {
    /// The job does not start.
    #[default]
    Fail,
    /// It is left out and counted.
    Skip,
}

/// What becomes of a row that is too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnLong {
    /// It is left out and counted.
    #[default]
    Skip,
    /// Completions are truncated, and counted.
    Truncate,
    /// The job does not start.
    Fail,
}

/// `[data]`: the rows of an offline algorithm.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSettings {
    /// Files and directories of ledgers, in this order.
    pub train: Vec<PathBuf>,
    /// Rows for evaluation; `None` holds out every tenth row of `train`.
    pub held_out: Option<PathBuf>,
    /// Rows of an optimizer step.
    pub batch_size: usize,
    /// Passes over the data; 0 leaves it to `job.steps`.
    pub epochs: f64,
    /// What becomes of a row that cannot be used.
    pub on_bad_row: OnBad,
    /// What becomes of a row with more than `tokens_max` tokens.
    pub on_long: OnLong,
    /// Tokens of a sequence at most; 0 for the model's context.
    pub tokens_max: usize,
    /// Held-out rows at most.
    pub held_out_rows: usize,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            held_out: None,
            batch_size: 8,
            epochs: 0.0,
            on_bad_row: OnBad::Fail,
            on_long: OnLong::Skip,
            tokens_max: 0,
            held_out_rows: 256,
        }
    }
}

impl Settings for DataSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("data");
        s.paths(
            "train",
            &mut self.train,
            "Rows to learn from, in this order: JSON Lines or Parquet with TRL's columns, or directories whose ledger is read \
             (a job's, or one that `rehearsal label` or `rehearsal import` filled). `sft`: `prompt` and `completion`, or \
             `messages`, or `text`. `dpo`, `reward_model`: `prompt`, `chosen`, `rejected` (texts or conversations; `margin`, \
             `score_chosen` and `score_rejected`, and for reward models `probability`, are used where there are any), or \
             `prompt`, `completions` and `ranks`.",
        );
        s.path(
            "held_out",
            &mut self.held_out,
            "Rows for evaluation, in the same form. Without it, every tenth row of `train` is held out.",
        );
        s.integer("batch_size", &mut self.batch_size, Range::within(1.0, 65_536.0), "Rows of an optimizer step.");
        let help = "Passes over the data, in place of `job.steps`; 0 leaves it to that.";
        s.number("epochs", &mut self.epochs, Range::from(0.0), help);
        s.choice(
            "on_bad_row",
            &mut self.on_bad_row,
            &[("fail", OnBad::Fail), ("skip", OnBad::Skip)],
            "What to do with a row that cannot be used (a missing column, an empty completion, chosen = rejected, a ranking of \
             ties): stop and name it, or skip and count it.",
        );
        s.choice(
            "on_long",
            &mut self.on_long,
            &[("skip", OnLong::Skip), ("truncate", OnLong::Truncate), ("fail", OnLong::Fail)],
            "What to do with a row over `tokens_max`: skip and count it, truncate its completions, or stop and name it.",
        );
        s.integer(
            "tokens_max",
            &mut self.tokens_max,
            Range::from(0.0),
            "Tokens of a prompt with its completion at most; 0 takes the model's context.",
        );
        s.integer("held_out_rows", &mut self.held_out_rows, Range::from(1.0), "Held-out rows at most.");
    }
}

/// `[prompts]`: what the policy is asked, and how prompts become tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptsSettings {
    /// Rows with a column `prompt`, a text or a conversation; `None` takes the embedded prompts.
    pub train: Option<PathBuf>,
    /// Prompts for evaluation; `None` holds out the last prompts of `train`.
    pub held_out: Option<PathBuf>,
    /// Column with a reference answer, for scorers that compare.
    pub answer_column: String,
    /// System message put before prompts that have none.
    pub system: Option<String>,
    /// Prompts are rendered by the model's chat template.
    pub chat: bool,
    /// What becomes of a line that cannot be used.
    pub on_bad_line: OnBad,
    /// What becomes of a prompt with more than `tokens_max` tokens.
    pub on_long: OnBad,
    /// Tokens of a prompt at most; 0 for what the context leaves.
    pub tokens_max: usize,
    /// Whether special tokens that are written out in prompts become those tokens.
    pub special_tokens: bool,
}

impl Default for PromptsSettings {
    fn default() -> Self {
        Self {
            train: None,
            held_out: None,
            answer_column: "answer".into(),
            system: None,
            chat: true,
            on_bad_line: OnBad::Fail,
            on_long: OnBad::Skip,
            tokens_max: 0,
            special_tokens: true,
        }
    }
}

impl Settings for PromptsSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("prompts");
        s.path(
            "train",
            &mut self.train,
            "Prompts to train on: JSON Lines with a column `prompt` (a text or a list of messages). Without it, the embedded \
             prompts.",
        );
        s.path(
            "held_out",
            &mut self.held_out,
            "Prompts for evaluation, in the same form. Without it, the last prompts of `train` are held out.",
        );
        let help = "Column with a reference answer, for scorers that compare with one.";
        s.text_or("answer_column", &mut self.answer_column, "a column", help);
        s.text("system", &mut self.system, "a text", "System message put before prompts that have none.");
        s.flag("chat", &mut self.chat, "Render prompts by the model's chat template, if it has one.");
        s.choice(
            "on_bad_line",
            &mut self.on_bad_line,
            &[("fail", OnBad::Fail), ("skip", OnBad::Skip)],
            "What to do with a line that is not a JSON object, or whose prompt is missing or empty: stop and name it, or skip \
             and count it.",
        );
        s.choice(
            "on_long",
            &mut self.on_long,
            &[("skip", OnBad::Skip), ("fail", OnBad::Fail)],
            "What to do with a prompt over `tokens_max`: skip and count it, or stop and name it.",
        );
        s.integer(
            "tokens_max",
            &mut self.tokens_max,
            Range::from(0.0),
            "Tokens of a prompt at most; 0 takes what the model's context leaves.",
        );
        s.flag(
            "special_tokens",
            &mut self.special_tokens,
            "Special tokens that are written out in prompts, such as `<|im_end|>`, become those tokens, as in transformers. With \
             `false` they stay text: for prompts that others wrote.",
        );
    }
}
