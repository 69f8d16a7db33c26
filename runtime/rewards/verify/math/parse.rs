//! Reads LaTeX and plain text as expressions.

use super::expression::Expression::{self, *};

/// Other spellings of the same.
const SPELLINGS: [(&str, &str); 11] = [
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\degree", ""),
    ("°", ""),
    ("percentage", "\\%"),
    ("percent", "\\%"),
    ("pct", "\\%"),
    (">=", "≥"),
    ("<=", "≤"),
    ("!=", "≠"),
    ("{, }", "{,}"),
];

/// Longest expression that is read, in characters.
const LENGTH_MAX: usize = 4096;
/// Deepest nesting of brackets.
const DEPTH_MAX: usize = 64;
/// Most operators that nest what is before them, such as the signs of a quotient's quotient: a tree of an expression is not
/// deeper than both together.
const NESTED_MAX: usize = 256;

/// How strictly LaTeX is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Arguments of fractions are in braces.
    Strict,
    /// `\frac12` is read too.
    Loose,
}

/// Reads an expression; `None` if it is none.
pub fn parse(source: &str, form: Form) -> Option<Expression> {
    if source.chars().count() > LENGTH_MAX {
        return None;
    }
    let source = SPELLINGS.iter().fold(source.to_string(), |text, (from, to)| text.replace(from, to));
    let mut parser = Parser { tokens: tokens(&source)?, at: 0, depth: 0, nested: 0, form };
    let all = parser.list()?;
    if parser.at < parser.tokens.len() {
        return None;
    }
    let mut all: Vec<Expression> = all.into_iter().map(without_units).collect();
    match all.len() {
        0 => None,
        1 => all.pop(),
        // `1, 2` are answers in any order.
        _ => Some(Set(all)),
    }
}

/// The answers without the words after a number, which are its unit.
fn without_units(e: Expression) -> Expression {
    match e {
        Product(mut parts) if parts.len() > 1 && !is_unit(&parts[0]) => {
            parts.retain(|part| !is_unit(part));
            if parts.len() == 1 { parts.remove(0) } else { Product(parts) }
        }
        Relation(left, sign, right) => Relation(left, sign, Box::new(without_units(*right))),
        other => other,
    }
}

fn is_unit(e: &Expression) -> bool {
    match e {
        Text(_) => true,
        Power(base, _) => matches!(**base, Text(_)),
        _ => false,
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number {
        text: String,
        exact: bool,
    },
    Symbol(String),
    Text(String),
    /// A command that takes arguments or is a function, without its backslash.
    Command(String),
    /// One of `+ - * / ^ _ ! % , | & ( ) [ ] { }`, `«` and `»` for the braces of sets, `∪`, `∞`, and signs of relations.
    Sign(char),
    Begin,
    End,
    /// The end of a matrix's row.
    Row,
}

const FUNCTIONS: [&str; 14] =
    ["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "lg", "ln", "exp", "sqrt"];
const GREEK: [&str; 23] = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "varphi",
];
const WORDS: [&str; 9] =
    ["text", "textnormal", "textbf", "textit", "mathrm", "mbox", "mathbf", "operatorname", "textrm"];
const SILENT: [&str; 10] = ["left", "right", "displaystyle", "limits", "quad", "qquad", "big", "Big", "bigl", "bigr"];

fn tokens(source: &str) -> Option<Vec<Token>> {
    use Token::*;
    let characters: Vec<char> = source.chars().collect();
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(&c) = characters.get(at) {
        at += 1;
        let rest = |at: usize| characters.get(at).copied();
        match c {
            ' ' | '\n' | '\t' | '~' | '$' => {}
            '0'..='9' | '.' if c != '.' || rest(at).is_some_and(|next| next.is_ascii_digit()) => {
                let nested = open(&found);
                let (text, exact, next) = number(&characters, at - 1, nested);
                found.push(Number { text, exact });
                at = next;
            }
            // The end of a sentence.
            '.' => {}
            'a'..='z' | 'A'..='Z' => found.push(Symbol(c.to_string())),
            '\\' => {
                let name: String = characters[at..].iter().take_while(|c| c.is_ascii_alphabetic()).collect();
                at += name.chars().count();
                if name.is_empty() {
                    let c = rest(at)?;
                    at += 1;
                    match c {
                        '{' => found.push(Sign('«')),
                        '}' => found.push(Sign('»')),
                        '%' => found.push(Sign('%')),
                        '\\' => found.push(Row),
                        '!' | ',' | ';' | ':' | ' ' | '$' => {}
                        _ => return None,
                    }
                    continue;
                }
                at = command(&name, &characters, at, &mut found)?;
            }
            'π' => found.push(Symbol("pi".into())),
            '√' => found.push(Command("sqrt".into())),
            '−' | '–' => found.push(Sign('-')),
            '×' | '·' | '⋅' => found.push(Sign('*')),
            '÷' => found.push(Sign('/')),
            '+' | '-' | '*' | '/' | '^' | '_' | '!' | '%' | ',' | '|' | '&' | '(' | ')' | '[' | ']' | '{' | '}'
            | '=' | '<' | '>' | '≤' | '≥' | '≠' | '∈' | '≈' | '±' | '∞' | '∪' => found.push(Sign(c)),
            ';' => found.push(Sign(',')),
            _ => return None,
        }
    }
    Some(found)
}

/// Whether a bracket is open, in which commas separate items and not thousands.
fn open(found: &[Token]) -> bool {
    let depth = found.iter().fold(0i32, |depth, token| match token {
        Token::Sign('(' | '[' | '«') => depth + 1,
        Token::Sign(')' | ']' | '»') => depth - 1,
        _ => depth,
    });
    depth > 0
}

/// A number at a place: its digits without separators of thousands, whether it is whole, and the place after it.
fn number(characters: &[char], start: usize, nested: bool) -> (String, bool, usize) {
    let (mut text, mut exact, mut at, mut grouped) = (String::new(), true, start, false);
    let digit = |at: usize| characters.get(at).is_some_and(char::is_ascii_digit);
    // `{,}` is a comma between thousands too.
    let separator = |at: usize| -> usize {
        match characters.get(at..) {
            Some([',', '\\', '!', ' ', ..]) => 4,
            Some([',', '\\', '!', ..]) => 3,
            Some([',', ..]) if !nested => 1,
            Some(['{', ',', '}', ..]) => 3,
            Some(['\\', ',' | '!', ..]) => 2,
            _ => 0,
        }
    };
    while let Some(&c) = characters.get(at) {
        let skip = separator(at);
        let group = skip > 0 && (1..=3).all(|k| digit(at + skip + k - 1)) && !digit(at + skip + 3);
        match c {
            '0'..='9' => text.push(c),
            '.' if exact && digit(at + 1) => {
                text.push(c);
                exact = false;
            }
            _ if group && exact && (grouped || (1..=3).contains(&text.len())) => {
                grouped = true;
                at += skip;
                continue;
            }
            _ => break,
        }
        at += 1;
    }
    (text, exact, at)
}

/// Adds a command's tokens; the place after it.
fn command(name: &str, characters: &[char], at: usize, found: &mut Vec<Token>) -> Option<usize> {
    use Token::*;
    let sign = |found: &mut Vec<Token>, c| {
        found.push(Sign(c));
        Some(at)
    };
    match name {
        "dfrac" | "tfrac" | "cfrac" | "frac" => found.push(Command("frac".into())),
        "dbinom" | "tbinom" | "binom" => found.push(Command("binom".into())),
        "cdot" | "times" | "ast" => return sign(found, '*'),
        "div" => return sign(found, '/'),
        "le" | "leq" | "leqslant" => return sign(found, '≤'),
        "ge" | "geq" | "geqslant" => return sign(found, '≥'),
        "lt" => return sign(found, '<'),
        "gt" => return sign(found, '>'),
        "ne" | "neq" => return sign(found, '≠'),
        "in" => return sign(found, '∈'),
        "approx" => return sign(found, '≈'),
        "pm" => return sign(found, '±'),
        "infty" => return sign(found, '∞'),
        "cup" => return sign(found, '∪'),
        "lbrace" => return sign(found, '«'),
        "rbrace" => return sign(found, '»'),
        "lfloor" => found.push(Command("floor".into())),
        "rfloor" => return sign(found, '⌋'),
        "lceil" => found.push(Command("ceil".into())),
        "rceil" => return sign(found, '⌉'),
        "lvert" | "rvert" | "vert" | "mid" => return sign(found, '|'),
        "emptyset" | "varnothing" => found.extend([Sign('«'), Sign('»')]),
        "begin" | "end" => {
            let (environment, mut next) = braced(characters, at)?;
            if (name, environment.as_str()) == ("begin", "array") {
                next = braced(characters, next)?.1; // its columns
            }
            found.push(if name == "begin" { Begin } else { End });
            return Some(next);
        }
        _ if SILENT.contains(&name) => {}
        _ if WORDS.contains(&name) => {
            let (text, next) = braced(characters, at)?;
            let text = text.trim().trim_matches(['(', ')']).to_lowercase();
            if !text.is_empty() {
                found.push(Text(text));
            }
            return Some(next);
        }
        "boxed" | "fbox" => {} // its braces are a group
        _ if FUNCTIONS.contains(&name) => found.push(Command(name.into())),
        _ if GREEK.contains(&name.to_lowercase().as_str()) => found.push(Symbol(name.into())),
        _ => return None,
    }
    Some(at)
}

/// The text of a group in braces, and the place after it.
fn braced(characters: &[char], at: usize) -> Option<(String, usize)> {
    let start = at + characters[at..].iter().take_while(|c| **c == ' ').count();
    if characters.get(start) != Some(&'{') {
        return None;
    }
    let mut depth = 0;
    for (i, c) in characters.iter().enumerate().skip(start) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((characters[start + 1..i].iter().collect(), i + 1));
        }
    }
    None
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    nested: usize,
    form: Form,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn is(&self, sign: char) -> bool {
        self.peek() == Some(&Token::Sign(sign))
    }

    fn take(&mut self, sign: char) -> bool {
        let is = self.is(sign);
        self.at += usize::from(is);
        is
    }

    /// Counts an operator that nests what is before or behind it.
    fn nest(&mut self) -> Option<()> {
        self.nested += 1;
        (self.nested <= NESTED_MAX).then_some(())
    }

    /// Relations between commas.
    fn list(&mut self) -> Option<Vec<Expression>> {
        let mut all = vec![self.relation()?];
        while self.take(',') {
            all.push(self.relation()?);
        }
        Some(all)
    }

    fn relation(&mut self) -> Option<Expression> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return None;
        }
        let mut left = self.union()?;
        while let Some(Token::Sign(sign @ ('=' | '<' | '>' | '≤' | '≥' | '≠' | '∈' | '≈'))) = self.peek().cloned()
        {
            self.at += 1;
            self.nest()?;
            let right = self.union()?;
            left = Relation(Box::new(left), sign, Box::new(right));
        }
        self.depth -= 1;
        Some(left)
    }

    fn union(&mut self) -> Option<Expression> {
        let mut all = vec![self.sum()?];
        while self.take('∪') {
            all.push(self.sum()?);
        }
        if all.len() == 1 { all.pop() } else { Some(Union(all)) }
    }

    fn sum(&mut self) -> Option<Expression> {
        let mut all = vec![self.product()?];
        loop {
            if self.take('+') {
                all.push(self.product()?);
            } else if self.take('-') {
                all.push(Negated(Box::new(self.product()?)));
            } else if self.take('±') {
                // Both signs: two answers.
                let part = self.product()?;
                let mut other = all.clone();
                all.push(part.clone());
                other.push(Negated(Box::new(part)));
                return Some(Set(vec![Sum(all), Sum(other)]));
            } else {
                break;
            }
        }
        if all.len() == 1 { all.pop() } else { Some(Sum(all)) }
    }

    fn product(&mut self) -> Option<Expression> {
        if self.take('-') {
            self.nest()?;
            return Some(Negated(Box::new(self.product()?)));
        }
        if self.take('+') {
            self.nest()?;
            return self.product();
        }
        let mut left = self.power()?;
        loop {
            if self.take('*') {
                let right = self.signed_power()?;
                left = times(left, right);
            } else if self.take('/') {
                self.nest()?;
                let right = self.signed_power()?;
                left = Quotient(Box::new(left), Box::new(right));
            } else if self.begins_factor() {
                // A whole number before a fraction is a mixed number.
                let mixed =
                    matches!(left, Number { exact: true, .. }) && self.peek() == Some(&Token::Command("frac".into()));
                let right = self.power()?;
                left = if mixed { Sum(vec![left, right]) } else { times(left, right) };
            } else {
                return Some(left);
            }
        }
    }

    fn signed_power(&mut self) -> Option<Expression> {
        if self.take('-') { Some(Negated(Box::new(self.power()?))) } else { self.power() }
    }

    fn begins_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Symbol(_) | Token::Text(_) | Token::Command(_) | Token::Begin) => true,
            Some(Token::Sign('(' | '{' | '«' | '∞')) => true,
            // Two numbers side by side are no product.
            _ => false,
        }
    }

    fn power(&mut self) -> Option<Expression> {
        let mut base = self.atom()?;
        loop {
            if self.take('!') {
                self.nest()?;
                base = Function("factorial".into(), vec![base]);
            } else if self.take('%') {
                self.nest()?;
                base = Percent(Box::new(base));
            } else if self.take('^') {
                self.nest()?;
                let exponent = self.argument()?;
                base = Power(Box::new(base), Box::new(exponent));
            } else {
                return Some(base);
            }
        }
    }

    /// What follows a command, `^` or `_`: a group, or a single token.
    fn argument(&mut self) -> Option<Expression> {
        if self.is('{') {
            return self.group();
        }
        if self.take('-') {
            return Some(Negated(Box::new(self.atom()?)));
        }
        self.atom()
    }

    fn group(&mut self) -> Option<Expression> {
        if !self.take('{') {
            return None;
        }
        let mut all = self.list()?;
        if !self.take('}') {
            return None;
        }
        if all.len() == 1 { all.pop() } else { Some(Set(all)) }
    }

    /// A part of a fraction: a group, or one digit where LaTeX is read loosely.
    fn part(&mut self) -> Option<Expression> {
        if self.form == Form::Strict || self.is('{') {
            return self.group();
        }
        let Some(Token::Number { text, exact: true }) = self.peek().cloned() else { return None };
        let (digit, rest) = text.split_at_checked(1)?;
        if rest.is_empty() {
            self.at += 1;
        } else {
            self.tokens[self.at] = Token::Number { text: rest.into(), exact: true };
        }
        digit.parse().ok().map(|value| Number { value, exact: true })
    }

    fn atom(&mut self) -> Option<Expression> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return None;
        }
        let token = self.peek()?.clone();
        let atom = match token {
            Token::Sign('{') => self.group(),
            Token::Sign(open @ ('(' | '[')) => self.bracketed(open),
            Token::Sign('«') => self.set(),
            Token::Sign('|') => {
                self.at += 1;
                let inside = self.sum()?;
                self.take('|').then(|| Function("abs".into(), vec![inside]))
            }
            Token::Sign('∞') => {
                self.at += 1;
                Some(Infinity)
            }
            Token::Number { text, exact } => {
                self.at += 1;
                text.parse().ok().map(|value| Number { value, exact })
            }
            Token::Text(text) => {
                self.at += 1;
                Some(Text(text))
            }
            Token::Symbol(name) => {
                self.at += 1;
                self.subscripted(name)
            }
            Token::Command(name) => {
                self.at += 1;
                self.called(&name)
            }
            Token::Begin => self.matrix(),
            _ => None,
        };
        self.depth -= 1;
        atom
    }

    fn subscripted(&mut self, name: String) -> Option<Expression> {
        if !self.take('_') {
            return Some(Symbol(name));
        }
        let index = self.argument()?;
        Some(Symbol(format!("{name}_{index:?}")))
    }

    fn bracketed(&mut self, open: char) -> Option<Expression> {
        self.at += 1;
        let mut all = self.list()?;
        let close = match self.peek() {
            Some(Token::Sign(close @ (')' | ']'))) => *close,
            _ => return None,
        };
        self.at += 1;
        // Brackets around one expression, or around a matrix, group it.
        let groups = (open, close) == ('(', ')') || matches!(all[..], [Matrix(_)]);
        if all.len() == 1 && groups { all.pop() } else { Some(Tuple(open, all, close)) }
    }

    fn set(&mut self) -> Option<Expression> {
        self.at += 1;
        if self.take('»') {
            return Some(Set(Vec::new()));
        }
        let all = self.list()?;
        self.take('»').then_some(Set(all))
    }

    /// A command's arguments, which must be in braces where it has several.
    fn called(&mut self, name: &str) -> Option<Expression> {
        match name {
            "frac" => Some(Quotient(Box::new(self.part()?), Box::new(self.part()?))),
            "binom" => Some(Function("binomial".into(), vec![self.group()?, self.group()?])),
            "floor" | "ceil" => {
                let inside = self.sum()?;
                let close = if name == "floor" { '⌋' } else { '⌉' };
                self.take(close).then(|| Function(name.into(), vec![inside]))
            }
            "sqrt" if self.take('[') => {
                let degree = self.sum()?;
                if !self.take(']') {
                    return None;
                }
                Some(Function("root".into(), vec![degree, self.argument()?]))
            }
            "sqrt" => Some(Function("sqrt".into(), vec![self.argument()?])),
            "log" if self.take('_') => {
                let base = self.argument()?;
                Some(Function("logarithm".into(), vec![base, self.power()?]))
            }
            _ => {
                // `\sin^2 x` is the square of the sine.
                let exponent = if self.take('^') { Some(self.argument()?) } else { None };
                let of = Function(name.into(), vec![self.operand()?]);
                Some(match exponent {
                    Some(exponent) => Power(Box::new(of), Box::new(exponent)),
                    None => of,
                })
            }
        }
    }

    /// What a function without brackets is of: the factors that follow, as in `\sin 2x`.
    fn operand(&mut self) -> Option<Expression> {
        if self.is('(') || self.is('{') {
            return self.power();
        }
        let mut all = self.power()?;
        while matches!(self.peek(), Some(Token::Symbol(_))) {
            let next = self.power()?;
            all = times(all, next);
        }
        Some(all)
    }

    fn matrix(&mut self) -> Option<Expression> {
        self.at += 1;
        let mut rows = vec![vec![self.relation()?]];
        loop {
            if self.take('&') {
                let next = self.relation()?;
                rows.last_mut()?.push(next);
            } else if self.peek() == Some(&Token::Row) {
                self.at += 1;
                if self.peek() != Some(&Token::End) {
                    rows.push(vec![self.relation()?]);
                }
            } else if self.peek() == Some(&Token::End) {
                self.at += 1;
                return Some(Matrix(rows));
            } else {
                return None;
            }
        }
    }
}

fn times(left: Expression, right: Expression) -> Expression {
    match left {
        Product(mut all) => {
            all.push(right);
            Product(all)
        }
        left => Product(vec![left, right]),
    }
}
