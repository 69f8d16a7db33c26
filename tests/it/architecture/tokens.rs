//! Rust source as tokens, as far as paths and modules can be read from it.

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    Word(String),
    /// `::`
    Separator,
    Mark(char),
}

impl Token {
    pub fn is(&self, mark: char) -> bool {
        *self == Self::Mark(mark)
    }

    pub fn word(&self) -> Option<&str> {
        match self {
            Self::Word(word) => Some(word),
            _ => None,
        }
    }
}

/// The tokens of a file without comments, texts and code that only tests compile.
pub fn tokens(source: &str) -> Vec<Token> {
    without_tests(scan(source))
}

fn scan(source: &str) -> Vec<Token> {
    let text: Vec<char> = source.chars().collect();
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let (mut tokens, mut i) = (Vec::new(), 0);
    while i < text.len() {
        match (at(i), at(i + 1)) {
            ('/', '/') => i = (i..text.len()).find(|&j| at(j) == '\n').unwrap_or(text.len()),
            ('/', '*') => i = after_comment(&text, i),
            ('"', _) => i = after_text(&text, i),
            ('r', '"' | '#') if raw(&text, i).is_some() => i = raw(&text, i).unwrap_or(i + 1),
            // A character, not a lifetime.
            ('\'', '\\') => i = (i + 3..text.len()).find(|&j| at(j) == '\'').unwrap_or(text.len()) + 1,
            ('\'', _) if at(i + 2) == '\'' => i += 3,
            (':', ':') => {
                tokens.push(Token::Separator);
                i += 2;
            }
            (c, _) if c.is_alphanumeric() || c == '_' => {
                let end = (i..text.len()).find(|&j| !(at(j).is_alphanumeric() || at(j) == '_')).unwrap_or(text.len());
                tokens.push(Token::Word(text[i..end].iter().collect()));
                i = end;
            }
            (c, _) => {
                if !c.is_whitespace() {
                    tokens.push(Token::Mark(c));
                }
                i += 1;
            }
        }
    }
    tokens
}

fn after_comment(text: &[char], begin: usize) -> usize {
    let (mut depth, mut i) = (0, begin);
    while i + 1 < text.len() {
        match (text[i], text[i + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                i += 1;
                continue;
            }
        }
        i += 2;
        if depth == 0 {
            return i;
        }
    }
    text.len()
}

fn after_text(text: &[char], begin: usize) -> usize {
    let mut i = begin + 1;
    while i < text.len() && text[i] != '"' {
        i += if text[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The end of a raw text that begins here, if one does.
fn raw(text: &[char], begin: usize) -> Option<usize> {
    let hashes = text[begin + 1..].iter().take_while(|c| **c == '#').count();
    let open = begin + 1 + hashes;
    if text.get(open) != Some(&'"') {
        return None;
    }
    let closes = |i: &usize| text[*i] == '"' && text[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
    (open + 1..text.len()).find(closes).map(|i| i + 1 + hashes)
}

/// Drops every item behind `#[cfg(test)]` (or `all(test, ..)`), up to its `;` or the end of its braces.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let end = attribute(&tokens, i);
        let Some(end) = end else {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        };
        let words: Vec<&str> = tokens[i..end].iter().filter_map(Token::word).collect();
        if !(words.first() == Some(&"cfg") && words.contains(&"test") && !words.contains(&"not")) {
            kept.extend_from_slice(&tokens[i..end]);
            i = end;
            continue;
        }
        i = end;
        let mut depth = 0;
        while i < tokens.len() {
            let token = &tokens[i];
            i += 1;
            depth += i32::from(token.is('{')) - i32::from(token.is('}'));
            if depth == 0 && (token.is(';') || token.is('}')) {
                break;
            }
        }
    }
    kept
}

/// The end of an attribute `#[..]` that begins here.
fn attribute(tokens: &[Token], begin: usize) -> Option<usize> {
    if !(tokens[begin].is('#') && tokens.get(begin + 1)?.is('[')) {
        return None;
    }
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(begin + 1) {
        depth += i32::from(token.is('[')) - i32::from(token.is(']'));
        if depth == 0 {
            return Some(i + 1);
        }
    }
    None
}
