//! Training data: rows of files in TRL's columns, validated and tokenised, drawn in an order that is a function of the
//! seed. Rows that are left out are counted by reason.

pub(crate) mod columns;
mod demonstrations;
mod dropped;
mod evaluation;
pub(crate) mod ledger;
mod offline;
pub(crate) mod preferences;
mod prompts;
pub(crate) mod rows;
mod settings;
mod shuffle;
mod tokenize;
pub(crate) mod write;

pub use dropped::{Dropped, DroppedRows};
pub(crate) use evaluation::{LabelledPairs, labelled_pairs, prompts_of};
pub use offline::{Content, RowReader, Rows};
pub use preferences::PairRow;
pub use prompts::{PromptRow, Prompts};
pub use settings::{DataSettings, OnBad, OnLong, PromptsSettings};
pub use shuffle::order;
