//! Changes of TOML that cannot silently do nothing.

use toml_edit::{DocumentMut, Value};

/// `text` with `from`, which must occur exactly once, replaced by `to`.
#[track_caller]
pub fn replace_once(text: &str, from: &str, to: &str) -> String {
    let found = text.matches(from).count();
    assert_eq!(found, 1, "{from:?} occurs {found} times, not once, in\n{text}");
    text.replace(from, to)
}

/// A document with a key, written as `section.key`, set. Comments and the order of keys stay.
pub fn set(text: &str, key: &str, value: impl Into<Value>) -> String {
    let mut document: DocumentMut = text.parse().unwrap_or_else(|e| panic!("{e} in\n{text}"));
    let (section, key) = key.split_once('.').expect("section.key");
    document.entry(section).or_insert_with(toml_edit::table)[key] = toml_edit::value(value);
    document.to_string()
}
