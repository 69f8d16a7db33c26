//! Training data: rows of files in TRL's columns, validated and tokenised, drawn in an order that is a function of the
//! seed. Rows that are left out are counted by reason.

pub(crate) mod columns;
mod demonstrations;
mod dropped;
mod evaluation;
pub mod ledger;
mod offline;
#[cfg_attr(not(feature = "parquet"), path = "without_parquet.rs")]
mod parquet;
pub(crate) mod preferences;
mod prompts;
pub(crate) mod rows;
mod settings;
mod shuffle;
mod tokenize;
mod write;

pub use dropped::{Dropped, DroppedRows};
pub use evaluation::prompts_of;
pub(crate) use evaluation::{LabelledPairs, labelled_pairs};
pub use offline::{Content, RowReader, Rows};
pub use preferences::PairRow;
pub(crate) use prompts::encode_prompt;
pub use prompts::{PromptRow, Prompts};
pub use settings::{DataSettings, OnBad, OnLong, PromptsSettings};
pub use shuffle::order;
pub use write::write;
