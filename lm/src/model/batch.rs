//! Packed sequences: one token axis, offsets instead of padding, and the positions whose log-probabilities are wanted.

use std::sync::Arc;

use rehearsal_kernels::attention::Family;

/// A prompt and what was said to it.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    pub prompt: &'a [u32],
    pub completion: &'a [u32],
}

/// Sequences end to end on one token axis, neighbours with the same prompt sharing it; the head runs on the rows
/// that predict a completion token.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// All tokens; the last of a sequence is left out, since nothing follows it.
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) families: Arc<Vec<Family>>,
    /// Rows of the token axis whose next token is scored, and those tokens.
    pub(crate) rows: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    /// Whether the entropies of the rows are asked for beside their targets' log-probabilities.
    pub(crate) entropy: bool,
    spans: Vec<usize>,
}

impl Batch {
    /// Packs sequences. A prompt may be empty; the completion's first token is then not scored.
    ///
    /// Sequences that follow one another and have the same prompt go through the model with one copy of it.
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
                // The prompt's last row predicts the first token, and each token the next.
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

    /// Packs sequences of which the rows of their last tokens are read, each once: for scores of whole sequences. A
    /// sequence without tokens is an error of the caller's; it is left out.
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

    /// Packs sequences of which the tokens that are marked are learned from, the first of a sequence never: for
    /// conversations in which only some turns count. The lengths of tokens and marks agree.
    pub fn marked<'a>(sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) -> Self {
        let mut batch = Batch { spans: vec![0], ..Self::default() };
        let mut families: Vec<Family> = Vec::new();
        for (tokens, marks) in sequences {
            // What follows the last marked token is seen by nothing that counts.
            let end = marks.iter().rposition(|&m| m).unwrap_or(0);
            let rows = batch.push(&tokens[..end.min(tokens.len())], 0);
            for i in (1..=end).filter(|&i| marks[i]) {
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

    /// Tokens on the packed axis.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Log-probabilities asked for.
    pub fn scored(&self) -> usize {
        self.targets.len()
    }

    /// Asks for the entropies of the predicted distributions too: they follow the log-probabilities in
    /// [`Forward::output`](super::Forward::output).
    pub fn with_entropy(mut self) -> Self {
        self.entropy = true;
        self
    }

    /// Rows that are read.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Place of every packed token in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
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
        assert_eq!(batch.rows, [1, 2, 3, 4]);
        assert_eq!(batch.targets, [7, 8, 2, 3]);
        assert_eq!(batch.spans(), [0, 2, 4]);
    }

    #[test]
    fn neighbours_share_their_prompt() {
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
