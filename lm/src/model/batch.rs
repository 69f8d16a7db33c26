//! Packed sequences: one token axis, offsets instead of padding, and the positions whose log-probabilities are wanted.

use std::sync::Arc;

/// A prompt and what was said to it.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    pub prompt: &'a [u32],
    pub completion: &'a [u32],
}

/// Sequences end to end on one token axis; the head runs on the rows that predict a completion token.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// All tokens; the last of a sequence is left out, since nothing follows it.
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) offsets: Arc<Vec<usize>>,
    /// Rows of the token axis whose next token is scored, and those tokens.
    pub(crate) rows: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    spans: Vec<usize>,
}

impl Batch {
    /// Packs sequences. A prompt may be empty; the completion's first token is then not scored.
    pub fn new<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Self {
        let mut batch = Batch { spans: vec![0], ..Self::default() };
        let mut offsets = vec![0];
        for Sequence { prompt, completion } in sequences {
            let start = batch.ids.len();
            let len = (prompt.len() + completion.len()).saturating_sub(1);
            batch.ids.extend(prompt.iter().chain(completion).take(len));
            batch.positions.extend(0..len as u32);
            for (i, &token) in completion.iter().enumerate() {
                if let Some(row) = (prompt.len() + i).checked_sub(1) {
                    batch.rows.push((start + row) as u32);
                    batch.targets.push(token);
                }
            }
            offsets.push(batch.ids.len());
            batch.spans.push(batch.targets.len());
        }
        batch.offsets = Arc::new(offsets);
        batch
    }

    /// Tokens on the packed axis.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Log-probabilities asked for.
    pub fn scored(&self) -> usize {
        self.targets.len()
    }

    /// Sequence `s` owns the log-probabilities `spans()[s]..spans()[s + 1]`.
    pub fn spans(&self) -> &[usize] {
        &self.spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_predict_the_next_token() {
        let batch = Batch::new([
            Sequence { prompt: &[5, 6], completion: &[7, 8] },
            Sequence { prompt: &[], completion: &[1, 2, 3] },
        ]);
        assert_eq!(batch.ids, [5, 6, 7, 1, 2]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(*batch.offsets, [0, 3, 5]);
        assert_eq!(batch.rows, [1, 2, 3, 4]);
        assert_eq!(batch.targets, [7, 8, 2, 3]);
        assert_eq!(batch.spans(), [0, 2, 4]);
    }
}
