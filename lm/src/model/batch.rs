//! Packed sequences: one token axis with offsets instead of padding, and the rows that the head reads.

use std::sync::Arc;

use rehearsal_kernels::attention::Family;

/// A prompt with a completion.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Token ids of the prompt.
    pub prompt: &'a [u32],
    /// Token ids of the completion.
    pub completion: &'a [u32],
}

/// Packed sequences: all tokens on one axis, without padding, the head run only on the rows that are read.
///
/// Adjacent sequences with the same prompt share one copy of it.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Tokens `[tokens]`; those of a sequence after the last row that is read are left out.
    pub(crate) ids: Vec<u32>,
    /// Position of each token in its sequence.
    pub(crate) positions: Vec<u32>,
    /// Rows of each prompt and of the completions that share it.
    pub(crate) families: Arc<Vec<Family>>,
    /// Rows of the token axis that the head reads.
    pub(crate) rows: Vec<u32>,
    /// Token whose log-probability is computed at each of `rows`; empty for scores.
    pub(crate) targets: Vec<u32>,
    /// Whether the entropies of the predicted distributions are computed too.
    pub(crate) entropy: bool,
    spans: Vec<usize>,
}

impl Batch {
    /// Packs sequences for the log-probabilities of their completion tokens. A prompt may be empty; the first token of
    /// the completion has no log-probability then.
    ///
    /// Adjacent sequences with the same prompt share one copy of it.
    pub fn new<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Self {
        let mut batch = Batch { spans: vec![0], ..Self::default() };
        let mut families: Vec<Family> = Vec::new();
        let mut shared: Option<&[u32]> = None;
        for Sequence { prompt, completion } in sequences {
            if shared.is_none_or(|shared| shared.is_empty() || shared != prompt) {
                let rows = batch.push(prompt, 0);
                families.push(Family { prompt: rows, completions: Vec::new() });
                shared = Some(prompt);
            }
            let Some(family) = families.last_mut() else { continue };
            let body = &completion[..completion.len().saturating_sub(1)];
            let rows = batch.push(body, prompt.len());
            for (i, &token) in completion.iter().enumerate() {
                // The prompt's last row predicts the first token, each later row the next one.
                let row = match i.checked_sub(1) {
                    None if prompt.is_empty() => continue,
                    None => family.prompt.end - 1,
                    Some(before) => rows.start + before,
                };
                batch.rows.push(row as u32);
                batch.targets.push(token);
            }
            family.completions.push(rows);
            batch.spans.push(batch.targets.len());
        }
        batch.families = Arc::new(families);
        batch
    }

    /// Packs sequences for one score each, read at the last token. Sequences without tokens have no score and are left
    /// out, so callers must not pass any.
    pub fn ends<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Self {
        let mut batch = Batch { spans: vec![0], ..Self::default() };
        let mut families: Vec<Family> = Vec::new();
        let mut shared: Option<&[u32]> = None;
        for Sequence { prompt, completion } in
            sequences.into_iter().filter(|s| !(s.prompt.is_empty() && s.completion.is_empty()))
        {
            if shared.is_none_or(|shared| shared.is_empty() || shared != prompt) {
                let rows = batch.push(prompt, 0);
                families.push(Family { prompt: rows, completions: Vec::new() });
                shared = Some(prompt);
            }
            let Some(family) = families.last_mut() else { continue };
            let rows = batch.push(completion, prompt.len());
            let last = if rows.is_empty() { family.prompt.end } else { rows.end } - 1;
            batch.rows.push(last as u32);
            batch.spans.push(batch.rows.len());
            family.completions.push(rows);
        }
        batch.families = Arc::new(families);
        batch
    }

    /// Packs sequences, each with a mask of equal length, for the log-probabilities of the tokens whose mask is true:
    /// for conversations of which only some turns are trained on. The first token of a sequence has no log-probability.
    pub fn marked<'a>(sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) -> Self {
        let mut batch = Batch { spans: vec![0], ..Self::default() };
        let mut families: Vec<Family> = Vec::new();
        for (tokens, mask) in sequences {
            // Tokens after the last one in the mask are not needed.
            let end = mask.iter().rposition(|&m| m).unwrap_or(0);
            let rows = batch.push(&tokens[..end.min(tokens.len())], 0);
            for i in (1..=end).filter(|&i| mask[i]) {
                batch.rows.push((rows.start + i - 1) as u32);
                batch.targets.push(tokens[i]);
            }
            families.push(Family::alone(rows));
            batch.spans.push(batch.targets.len());
        }
        batch.families = Arc::new(families);
        batch
    }

    fn push(&mut self, tokens: &[u32], position: usize) -> std::ops::Range<usize> {
        let start = self.ids.len();
        self.ids.extend_from_slice(tokens);
        self.positions.extend((position as u32..).take(tokens.len()));
        start..self.ids.len()
    }

    /// Number of tokens on the packed axis.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of log-probabilities: tokens that the batch has targets for.
    pub fn scored(&self) -> usize {
        self.targets.len()
    }

    /// Also computes the entropies, in nats, of the predicted distributions. They follow the log-probabilities in
    /// [`Forward::output`](crate::Forward::output).
    pub fn with_entropy(mut self) -> Self {
        self.entropy = true;
        self
    }

    /// Number of rows that the head reads.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Position of each packed token in its sequence, `[tokens]`.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Offsets `[sequences + 1]`: sequence `s` has the log-probabilities `spans()[s]..spans()[s + 1]`.
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
        assert_eq!(batch.rows, [1, 2, 3, 4]);
        assert_eq!(batch.targets, [7, 8, 2, 3]);
        assert_eq!(batch.spans(), [0, 2, 4]);
    }

    #[test]
    fn adjacent_sequences_share_their_prompt() {
        let of = |prompt, completion| Sequence { prompt, completion };
        let batch = Batch::new([of(&[5, 6][..], &[7, 8][..]), of(&[5, 6], &[9]), of(&[5], &[1, 2]), of(&[5, 6], &[7])]);
        assert_eq!(batch.ids, [5, 6, 7, 5, 1, 5, 6]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 1]);
        assert_eq!(batch.rows, [1, 2, 1, 3, 4, 6]);
        assert_eq!(batch.targets, [7, 8, 9, 1, 2, 7]);
        assert_eq!(batch.spans(), [0, 2, 3, 5, 6]);
        assert_eq!(batch.families[0], Family { prompt: 0..2, completions: vec![2..3, 3..3] });
        assert_eq!(batch.families.len(), 3);
    }
}
