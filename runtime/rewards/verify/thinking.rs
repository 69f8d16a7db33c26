//! Completions that think between tags before they answer.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Whether a completion begins with `<think>`, has no second one, and closes it.
///
/// ```
/// use rehearsal::rewards::verify::thinking::is_think_format;
///
/// assert!(is_think_format("<think>\nTwo and two.\n</think>\nFour."));
/// assert!(!is_think_format("Four.") && !is_think_format("<think>Two and"));
/// ```
pub fn is_think_format(completion: &str) -> bool {
    let Some(rest) = completion.strip_prefix(OPEN) else { return false };
    !rest.contains(OPEN) && rest.contains(CLOSE)
}

/// What follows the last `</think>`; `None` if the thinking does not end.
pub fn after_thinking(completion: &str) -> Option<&str> {
    completion.rsplit_once(CLOSE).map(|(_, answer)| answer)
}
