//! Verdicts from a judge's words, read strictly: what an answer under judgement says cannot pass for a verdict.

/// What a judge thinks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// Probability that the first answer is better; 0.5 for a tie.
    pub first: f64,
    /// A grade from 1 to 10, where one was asked for.
    pub grade: f64,
}

impl Verdict {
    fn pair(first: f64) -> Self {
        Self { first, grade: 0.0 }
    }
}

/// Which of two answers is better: `[[1]]`, `[[2]]` or `[[tie]]` (also `[[A]]`, `[[B]]`, `[[C]]`) as the last line that
/// is not empty, and alone on it; or the probability that a local judge gave. Markers anywhere else count for nothing.
pub fn preference(reply: &str) -> Option<Verdict> {
    if let Some(probability) = reply.strip_prefix("p(1) = ") {
        return probability.trim().parse().ok().filter(|p| (0.0..=1.0).contains(p)).map(Verdict::pair);
    }
    match marked(reply)?.to_ascii_lowercase().as_str() {
        "1" | "a" => Some(Verdict::pair(1.0)),
        "2" | "b" => Some(Verdict::pair(0.0)),
        "tie" | "c" => Some(Verdict::pair(0.5)),
        _ => None,
    }
}

/// A grade: `[[7]]` on the last line, from 1 to 10.
pub fn grade(reply: &str) -> Option<Verdict> {
    let grade: f64 = match reply.strip_prefix("grade = ") {
        Some(grade) => grade.trim().parse().ok()?,
        None => marked(reply)?.parse().ok()?,
    };
    (1.0..=10.0).contains(&grade).then_some(Verdict { first: 0.5, grade })
}

/// What stands between double brackets on the last line.
fn marked(reply: &str) -> Option<&str> {
    let last = reply.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    let last = last.trim_matches(['*', '`', '"', '.']);
    let inner = last.strip_prefix("[[")?.strip_suffix("]]")?;
    (!inner.contains(['[', ']'])).then_some(inner.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_last_line_alone() {
        assert_eq!(preference("Both are fine.\n[[A]]").unwrap().first, 1.0);
        assert_eq!(preference("**[[2]]**\n\n").unwrap().first, 0.0);
        assert_eq!(preference("[[tie]]").unwrap().first, 0.5);
        // Quoted from an answer, in the middle of a sentence, two at once: no verdict.
        for reply in
            ["The answer says [[A]].", "[[A]] because it is good", "[[A]]\nbut then again", "[[A]][[B]]", "", "[[D]]"]
        {
            assert_eq!(preference(reply), None, "{reply}");
        }
        assert_eq!(preference("p(1) = 0.25").unwrap().first, 0.25);
        assert_eq!(preference("p(1) = 7"), None);
    }

    #[test]
    fn grades_lie_on_their_scale() {
        assert_eq!(grade("Good.\n[[7]]").unwrap().grade, 7.0);
        assert_eq!(grade("[[8.5]]").unwrap().grade, 8.5);
        for reply in ["[[11]]", "[[0]]", "7", "[[seven]]"] {
            assert_eq!(grade(reply), None, "{reply}");
        }
    }
}
