//! Mathematical answers: where they are in a text, and whether they are equal to a reference answer.

mod expression;
mod parse;

use expression::{Expression, equal};
use parse::{Form, parse};

/// Where the answer is looked for in a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Extraction {
    /// What `\boxed{}` holds, or without one the formula after "final answer is", as TRL does. Several boxes are one answer of
    /// several parts.
    #[default]
    Boxed,
    /// The same, and without either the last formula, or the last number.
    Any,
}

impl Extraction {
    /// TRL does not read fractions without braces.
    fn form(self) -> Form {
        match self {
            Self::Boxed => Form::Strict,
            Self::Any => Form::Loose,
        }
    }
}

/// Whether a completion's answer is equal to the reference answer; `None` if the reference answer is none that can be read.
///
/// ```
/// use rehearsal::rewards::verify::math::{Extraction, is_correct};
///
/// assert_eq!(is_correct("So it is \\boxed{\\frac{26}{6}}.", "$13/3$", Extraction::Boxed), Some(true));
/// assert_eq!(is_correct("The answer is 4.", "#### 5", Extraction::Any), Some(false));
/// ```
pub fn is_correct(completion: &str, reference: &str, extraction: Extraction) -> Option<bool> {
    let reference = reference_answer(reference, extraction.form())?;
    Some(answer(completion, extraction).is_some_and(|answer| equal(&answer, &reference)))
}

/// The answer of a completion.
fn answer(completion: &str, extraction: Extraction) -> Option<Expression> {
    let boxes = boxed(completion);
    if !boxes.is_empty() {
        return joined(&boxes, extraction.form());
    }
    let after = completion.to_lowercase().rfind("final answer is").and_then(|at| completion.get(at..));
    let anchored = after.and_then(|text| formulas(text).into_iter().next());
    match (anchored, extraction) {
        (Some(formula), _) => parse(formula, extraction.form()),
        (None, Extraction::Boxed) => None,
        (None, Extraction::Any) => anywhere(completion),
    }
}

/// The reference answer of a row: boxed, the last formula, the number after `####` (GSM8K), or plain.
fn reference_answer(text: &str, form: Form) -> Option<Expression> {
    let text = text.rsplit("####").next().unwrap_or(text).trim();
    let boxes = boxed(text);
    if !boxes.is_empty() {
        return joined(&boxes, form);
    }
    match formulas(text).last() {
        Some(formula) => parse(formula, form),
        None => plain(text),
    }
}

/// The whole text, if it is an expression; else the last formula, with a percent sign after it, or a number after that.
fn anywhere(text: &str) -> Option<Expression> {
    if !has_words(text)
        && !text.contains('$')
        && let Some(whole) = parse(text.trim(), Form::Loose)
    {
        return Some(whole);
    }
    let last = formulas(text).into_iter().rev().find_map(|formula| Some((formula, parse(formula, Form::Loose)?)));
    let Some((formula, answer)) = last else { return last_number(text) };
    let end = formula.as_ptr() as usize - text.as_ptr() as usize + formula.len();
    let after = text[end..].trim_start_matches(['$', '\\', ')', ']', ' ']);
    if ["%", "percent", "pct"].iter().any(|sign| after.starts_with(sign)) {
        return Some(Expression::Percent(Box::new(answer)));
    }
    // A variable is no answer where a number comes later.
    match answer {
        Expression::Symbol(_) => Some(last_number(after).unwrap_or(answer)),
        answer => Some(answer),
    }
}

/// Several answers as one.
fn joined(formulas: &[&str], form: Form) -> Option<Expression> {
    let mut all: Vec<Expression> = formulas.iter().map(|formula| parse(formula, form)).collect::<Option<_>>()?;
    if all.len() == 1 { all.pop() } else { Some(Expression::Set(all)) }
}

/// What every `\boxed{}` of a text holds. One that is not closed holds nothing.
fn boxed(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for command in ["\\boxed", "\\fbox"] {
        let mut rest = text;
        while let Some(at) = rest.find(command) {
            rest = &rest[at + command.len()..];
            let Some(inside) = rest.trim_start().strip_prefix('{') else { continue };
            if let Some(end) = closing(inside) {
                found.push(&inside[..end]);
                rest = &inside[end..];
            }
        }
    }
    found
}

/// Where the brace is that closes one before the text.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// The formulas of a text, in order: between dollars, `\(` and `\)`, or `\[` and `\]`.
fn formulas(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = text[at..].find(['$', '\\']).map(|next| at + next) {
        let rest = &text[next..];
        let pair = [("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)")]
            .into_iter()
            .find(|(open, _)| rest.starts_with(open));
        let Some((open, close)) = pair else {
            // An escaped dollar is money.
            at = next + 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let start = next + open.len();
        match end_of(&text[start..], close) {
            Some(len) => {
                found.push(&text[start..start + len]);
                at = start + len + close.len();
            }
            None => at = start,
        }
    }
    found
}

/// Where a formula ends that is closed by `close`. A formula within a line does not reach beyond it.
fn end_of(text: &str, close: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find(close)?;
        let escaped = close.starts_with('$') && text[..at].ends_with('\\');
        if !escaped {
            let within_line = matches!(close, "$" | "\\)");
            return (!within_line || !text[..at].contains('\n')).then_some(at);
        }
        from = at + close.len();
    }
}

/// An expression without LaTeX's signs, or the last number of words.
fn plain(text: &str) -> Option<Expression> {
    if text.chars().all(|c| c.is_ascii_digit() || matches!(c, ',' | '.' | '-')) {
        return decimal(text);
    }
    let text = text.replace("sqrt", "\\sqrt ").replace("pi", "\\pi ");
    if has_words(&text) { last_number(&text) } else { parse(&text, Form::Loose) }
}

/// Whether a text has words, which are no products of variables.
fn has_words(text: &str) -> bool {
    let (mut letters, mut command) = (0, false);
    text.chars().any(|c| {
        letters = if c.is_alphabetic() { letters + 1 } else { 0 };
        command = c == '\\' || (command && c.is_alphabetic());
        letters > 1 && !command
    })
}

/// The last number, fraction or percentage of a text of words.
fn last_number(text: &str) -> Option<Expression> {
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, ',' | '.' | '/' | '-' | '−');
    let mut found = None;
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit() || c == '.') {
        let before = rest[..start].chars().next_back();
        let start = if matches!(before, Some('-' | '−')) { start - before.map_or(0, char::len_utf8) } else { start };
        let end = rest[start..].find(|c| !is_part(c)).map_or(rest.len(), |len| start + len);
        let word = rest[start..end].trim_end_matches([',', '.', '/', '-']);
        // A digit within a word, such as `A2B`, is no answer.
        let within = before.is_some_and(char::is_alphabetic) && rest[end..].starts_with(char::is_alphabetic);
        let after = rest[end..].trim_start();
        let percent = ["%", "percent", "pct"].iter().any(|sign| after.starts_with(sign));
        if let Some(number) = decimal(word).filter(|_| !within) {
            found = Some(if percent { Expression::Percent(Box::new(number)) } else { number });
        }
        rest = &rest[end.max(start + 1)..];
    }
    found
}

/// A number of a text of words, in which a comma may stand before decimals.
fn decimal(word: &str) -> Option<Expression> {
    match word.split_once(',') {
        Some((whole, decimals)) if decimals.len() != 3 && decimals.chars().all(|c| c.is_ascii_digit()) => {
            parse(&format!("{whole}.{decimals}"), Form::Loose)
        }
        Some(("0" | "-0", decimals)) => parse(&format!("0.{decimals}"), Form::Loose),
        _ => parse(word, Form::Loose),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(a: &str, b: &str) -> bool {
        let read = |text: &str| parse(text, Form::Strict).unwrap_or_else(|| panic!("{text} is not read"));
        equal(&read(a), &read(b))
    }

    #[test]
    fn equal_expressions_are_found_however_they_are_written() {
        for (a, b) in [
            ("\\frac{1}{2}", "0.5"),
            ("\\dfrac{-3}{4}", "-\\frac{3}{4}"),
            ("0.333333", "1/3"),
            ("1{,}234{,}567", "1,234,567"),
            ("2\\frac{1}{2}", "5/2"),
            ("6\\sqrt{2}", "\\sqrt{72}"),
            ("\\sqrt[3]{27}", "3"),
            ("(x+6)^2", "x^2+12x+36"),
            ("\\frac{x^2-1}{x-1}", "x+1"),
            ("\\sin^2 x + \\cos^2 x", "1"),
            ("\\log_2 8", "3"),
            ("\\binom{5}{2}", "10"),
            ("5!", "120"),
            ("|-3|", "3"),
            ("90^\\circ", "90"),
            ("12\\text{ cm}^2", "12"),
            ("x = 5", "5"),
            ("a = b = 5", "5"),
            ("x \\geq 3", "3 \\le x"),
            ("\\left( 1, 2 \\right]", "(1,2]"),
            ("[0,1) \\cup (2,\\infty)", "(2,\\infty)\\cup[0,1)"),
            ("\\{1,2\\}", "\\{2,1\\}"),
            ("1, 2", "2, 1"),
            ("50\\%", "\\frac{1}{2}"),
            ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\\\\\end{bmatrix}"),
            ("\\text{ Evelyn }", "\\text{evelyn}"),
            ("2\\pi r", "2r\\pi"),
            ("e^{2x}", "(e^x)^2"),
            ("\\emptyset", "\\{\\}"),
            ("1 \\pm \\sqrt{2}", "\\{1-\\sqrt{2}, 1+\\sqrt{2}\\}"),
            ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
            ("-x > -1", "x < 1"),
            ("-2 \\le x < 7", "x \\in [-2,7)"),
            ("x = 1/3 \\approx 0.33", "1/3"),
            ("x = 5 + 6 = 11", "x = 11"),
            ("11,\\! 111,\\!100", "11111100"),
            ("\\text{(C)}", "C"),
        ] {
            assert!(same(a, b), "{a} and {b}");
        }
    }

    #[test]
    fn different_expressions_are_told_apart() {
        for (a, b) in [
            ("\\frac{1}{2}", "0.51"),
            ("0.3333", "1/3"),
            ("x+1", "x+2"),
            ("x", "y"),
            ("(1,2)", "(2,1)"),
            ("(1,2)", "[1,2]"),
            ("\\{1,2\\}", "\\{1,2,2\\}"),
            ("x \\geq 3", "x > 3"),
            ("x \\geq 3", "3"),
            ("\\text{yes}", "\\text{no}"),
            ("\\infty", "-\\infty"),
            ("50\\%", "5"),
            ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
            ("\\sqrt{x^2}", "-x"),
            ("x > 1", "-x > -1"),
            ("x + y = 1", "x + y = 2"),
            ("x = 5 + 6 = 11", "y = 11"),
        ] {
            assert!(!same(a, b), "{a} and {b}");
        }
    }

    #[test]
    fn what_is_no_expression_is_none_and_nothing_panics() {
        for text in [
            "",
            "\\frac12",
            "(1",
            "1)",
            "\\boxed",
            "{",
            "\\frac{1}",
            "2 3",
            "=",
            "\\sqrt",
            "x^",
            "#",
            "\\begin{x}",
            "1,,2",
        ] {
            assert_eq!(parse(text, Form::Strict), None, "{text}");
        }
        assert_eq!(parse(&"(".repeat(3000), Form::Loose), None);
        assert_eq!(parse(&"1+".repeat(3000), Form::Loose), None);
        assert_eq!(parse(&"-".repeat(4000), Form::Loose), None);
        for operator in ["!", "%", "^2", "/2", "=2", "\\%"] {
            assert_eq!(parse(&format!("2{}", operator.repeat(1000)), Form::Loose), None, "{operator}");
        }
        let odd = [
            "\\",
            "$",
            "\\boxed{",
            "$$",
            "\\(",
            "−",
            "#### ",
            "ﬁnal answer is $",
            "1−",
            "\u{130}final answer is $1$",
            "'",
            "_",
        ];
        for (a, b) in odd.iter().flat_map(|a| odd.map(|b| (*a, b))) {
            let _ = is_correct(&format!("{a}{b}"), &format!("{b}{a}"), Extraction::Any);
        }
    }

    #[test]
    fn answers_are_found_where_they_are() {
        let any = |text: &str, reference: &str| is_correct(text, reference, Extraction::Any);
        for (text, reference) in [
            ("It costs $3.50$ in all.", "3.5"),
            ("That makes 1,207 in all.", "#### 1207"),
            ("so \\(x = 4\\)", "4"),
            ("it is -3", "-3"),
            ("28 percent of them", "$28\\%$"),
            ("The final answer is $7$. I hope that 8 is not.", "7"),
            ("$$\\frac{1}{2}$$", "1/2"),
        ] {
            assert_eq!(any(text, reference), Some(true), "{text} for {reference}");
        }
        assert_eq!(any("$\\frac12$", "0.5"), Some(true));
        assert_eq!(any("none", "13"), Some(false));
        assert_eq!(any("12", "prime"), None);
        assert_eq!(is_correct("It is 4.", "4", Extraction::Boxed), Some(false), "it is in no box");
        assert_eq!(is_correct("\\boxed{3} \\boxed{4}", "4", Extraction::Boxed), Some(false), "two answers");
    }
}
