//! Inter-annotator agreement beyond chance.

/// Cohen's κ (1960) of two labellers on the same items: `(p_o - p_e) / (1 - p_e)`. `None` without items, or if both
/// used only one and the same label.
pub fn cohen<L: PartialEq>(first: &[L], second: &[L]) -> Option<f64> {
    let n = first.len().min(second.len());
    if n == 0 {
        return None;
    }
    let (first, second) = (&first[..n], &second[..n]);
    let observed = first.iter().zip(second).filter(|(a, b)| a == b).count() as f64 / n as f64;
    let count = |labels: &[L], label: &L| labels.iter().filter(|l| *l == label).count() as f64 / n as f64;
    let mut expected = 0.0;
    for (i, label) in first.iter().enumerate() {
        if !first[..i].contains(label) {
            expected += count(first, label) * count(second, label);
        }
    }
    (expected < 1.0).then(|| (observed - expected) / (1.0 - expected))
}

/// Fleiss' κ (1971), where `counts[item][label]` labellers gave `item` that label. `None` if there are fewer than two
/// labellers or unequal numbers of them per item, or if only one label was used.
pub fn fleiss(counts: &[Vec<u32>]) -> Option<f64> {
    let raters = f64::from(counts.first()?.iter().sum::<u32>());
    if raters < 2.0 || counts.iter().any(|c| f64::from(c.iter().sum::<u32>()) != raters) {
        return None;
    }
    let items = counts.len() as f64;
    let squares = |c: &Vec<u32>| c.iter().map(|&n| f64::from(n).powi(2)).sum::<f64>();
    let observed = counts.iter().map(|c| (squares(c) - raters) / (raters * (raters - 1.0))).sum::<f64>() / items;
    let labels = counts.iter().map(Vec::len).max()?;
    let share = |label: usize| {
        counts.iter().map(|c| f64::from(c.get(label).copied().unwrap_or(0))).sum::<f64>() / (items * raters)
    };
    let expected: f64 = (0..labels).map(|l| share(l).powi(2)).sum();
    (expected < 1.0).then(|| (observed - expected) / (1.0 - expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kappa_of_a_textbook_table() {
        // 50 items: 20 both yes, 5 yes/no, 10 no/yes, 15 both no: p_o = 0.7, p_e = 0.5, κ = 0.4.
        let pairs = [(20, 1, 1), (5, 1, 0), (10, 0, 1), (15, 0, 0)];
        let first: Vec<i32> = pairs.iter().flat_map(|&(n, a, _)| vec![a; n]).collect();
        let second: Vec<i32> = pairs.iter().flat_map(|&(n, _, b)| vec![b; n]).collect();
        assert!((cohen(&first, &second).unwrap() - 0.4).abs() < 1e-12);
        assert_eq!(cohen(&[1, 1], &[1, 1]), None);
        assert_eq!(cohen::<i32>(&[], &[]), None);
    }

    #[test]
    fn fleiss_of_the_paper() {
        // Fleiss 1971's example as it is usually reprinted: ten items, five labels, fourteen raters, κ = 0.210.
        let table = [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ];
        let counts: Vec<Vec<u32>> = table.iter().map(|row| row.to_vec()).collect();
        assert!((fleiss(&counts).unwrap() - 0.210).abs() < 5e-4);
        assert_eq!(fleiss(&[vec![1, 0], vec![2, 0]]), None);
    }
}
