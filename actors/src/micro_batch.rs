//! Splitting of a step's data into micro-batches of bounded size.

/// Splits `items` into consecutive micro-batches of at most `tokens_max` tokens, and of at least one item.
///
/// `size(previous, item)` is the number of tokens that an item adds to a micro-batch, in which `previous` comes right
/// before it: neighbours may share a prompt. The first item of a micro-batch has no previous one.
pub(crate) fn micro_batches<T, F>(items: &[T], tokens_max: usize, size: F) -> impl Iterator<Item = &[T]>
where
    F: Fn(Option<&T>, &T) -> usize,
{
    let mut rest = items;
    std::iter::from_fn(move || {
        let (mut tokens, mut previous) = (0, None);
        let fitting = rest.iter().take_while(|item| {
            tokens += size(previous, item);
            previous = Some(*item);
            tokens <= tokens_max
        });
        let n = fitting.count().max(1).min(rest.len());
        let (now, later) = rest.split_at(n);
        rest = later;
        (!now.is_empty()).then_some(now)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths<T>(items: &[T], tokens_max: usize, size: impl Fn(Option<&T>, &T) -> usize) -> Vec<usize> {
        micro_batches(items, tokens_max, size).map(<[T]>::len).collect()
    }

    #[test]
    fn micro_batches_fill_the_budget_and_keep_the_order() {
        let sizes = |items: &[usize], tokens_max: usize| lengths(items, tokens_max, |_, n| *n);
        assert_eq!(sizes(&[40, 50, 30, 200, 10, 90], 100), [2, 1, 1, 2]);
        assert_eq!(sizes(&[40, 50], usize::MAX), [2]);
        assert_eq!(sizes(&[], 100), [0usize; 0]);
    }

    #[test]
    fn a_shared_prompt_counts_once_in_a_micro_batch() {
        // Prompts of 50 tokens by name, completions of 10.
        let size = |previous: Option<&char>, prompt: &char| if previous == Some(prompt) { 10 } else { 60 };
        assert_eq!(lengths(&['a', 'a', 'a', 'b', 'a'], 80, size), [3, 1, 1]);
        assert_eq!(lengths(&['a', 'a', 'a', 'a', 'b'], 75, size), [2, 2, 1]);
    }

    proptest::proptest! {
        #[test]
        fn every_item_is_in_one_micro_batch_which_is_as_full_as_it_may_be(
            items in proptest::collection::vec(0usize..50, 0..40),
            tokens_max in 1usize..120,
        ) {
            let batches: Vec<&[usize]> = micro_batches(&items, tokens_max, |_, n| *n).collect();
            assert_eq!(batches.concat(), items);
            for (i, batch) in batches.iter().enumerate() {
                let tokens: usize = batch.iter().sum();
                assert!(!batch.is_empty() && (tokens <= tokens_max || batch.len() == 1));
                if let Some(next) = batches.get(i + 1) {
                    assert!(tokens + next[0] > tokens_max, "{batch:?} has room for {}", next[0]);
                }
            }
        }
    }
}
