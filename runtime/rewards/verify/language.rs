//! The language of a text.

/// Whether a text is in a language, by its code of ISO 639-3 such as `eng`; `None` for a code that is not known.
///
/// A text without words is in no language. Short texts may be taken for another one.
#[cfg(feature = "verify")]
pub fn is_language(text: &str, code: &str) -> Option<bool> {
    let language = whatlang::Lang::from_code(code)?;
    Some(whatlang::detect_lang(text) == Some(language))
}

/// The codes that are known.
#[cfg(feature = "verify")]
pub fn codes() -> Vec<&'static str> {
    whatlang::Lang::all().iter().map(|language| language.code()).collect()
}

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn languages_are_told_apart() {
        let german = "Der Hund läuft durch den Wald und sucht seine Freunde.";
        assert_eq!((is_language(german, "deu"), is_language(german, "eng")), (Some(true), Some(false)));
        assert_eq!((is_language("", "eng"), is_language(german, "xx")), (Some(false), None));
        assert!(codes().contains(&"fra"));
    }
}
