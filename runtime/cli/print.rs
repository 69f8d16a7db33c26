//! Printing that outlives its reader: of `rehearsal status | head`, the reader may be gone before all is printed.

/// Prints a line to standard output, unless nobody reads it any more.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout().lock(), $($text)*);
    }};
}

/// Prints a line to standard error, unless nobody reads it any more.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr().lock(), $($text)*);
    }};
}

pub(super) use {note, say};
