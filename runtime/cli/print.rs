//! Printing that outlives its reader: of `rehearsal status | head`, the reader may be gone before all is printed. What is
//! printed comes from models, servers and files too, so it cannot command the terminal.

/// The text with control characters other than line breaks and tabs shown as U+FFFD: an escape sequence of a server's error
/// or of a completion would be carried out by the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

/// Prints a line to standard output, unless nobody reads it any more.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let text = $crate::cli::print::printable(&format!($($text)*));
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }};
}

/// Prints a line to standard error, unless nobody reads it any more.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let text = $crate::cli::print::printable(&format!($($text)*));
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }};
}

pub(super) use {note, say};

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\tb\nc é"), "a\tb\nc é");
        // Clears the screen, sets the title, and the same by a single character.
        for command in ["\u{1b}[2J", "\u{1b}]0;title\u{7}", "\u{9b}2J", "over\rwritten"] {
            assert!(printable(command).chars().all(|c| !c.is_control()), "{command:?}");
        }
    }
}
