//! One section of a visit: reads a key, checks it, and notes what it is.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use toml_edit::{Item, Value};

use super::document::nearest;
use super::keys::{Effect, Key, Keys, Kind};
use super::problem::Problem;
use super::range::Range;
use super::stages::Earlier;

/// A section being visited.
pub struct Section<'a> {
    pub(super) keys: &'a mut Keys,
    pub(super) name: &'static str,
    effect: Effect,
}

/// What the reference and the schema say of a key.
pub(super) struct Described {
    pub key: &'static str,
    pub kind: Kind,
    pub values: String,
    pub help: &'static str,
}

impl<'a> Section<'a> {
    pub(super) fn new(keys: &'a mut Keys, name: &'static str) -> Self {
        Self { keys, name, effect: Effect::Result }
    }

    /// The next key changes only speed, memory or limits: see [`Effect::Speed`].
    pub fn speed(&mut self) -> &mut Self {
        self.effect = Effect::Speed;
        self
    }

    /// The next key names something whose content is fingerprinted: see [`Effect::Content`].
    pub fn content(&mut self) -> &mut Self {
        self.effect = Effect::Content;
        self
    }

    /// What earlier stages leave behind.
    pub(crate) fn earlier(&self) -> &Earlier {
        &self.keys.earlier
    }

    /// Whether the document has a value for the key.
    pub fn has(&self, key: &str) -> bool {
        self.keys.document.item(self.name, key).is_some()
    }

    /// Whether the document has a list with items for the key.
    pub fn has_items(&self, key: &str) -> bool {
        self.keys.document.item(self.name, key).and_then(Item::as_array).is_some_and(|list| !list.is_empty())
    }

    /// Reports a problem at a key.
    pub fn problem(&mut self, key: &str, message: impl Display) {
        let line = self.keys.document.line(self.name, key);
        self.keys.problems.push(Problem { line, message: format!("`{}.{key}` {message}", self.name) });
    }

    /// Reports a key whose value this build cannot use. `feature` completes a sentence such as "`judge.url` needs".
    pub fn requires(&mut self, key: &str, enabled: bool, feature: impl Display) {
        if !enabled {
            self.problem(key, format!("needs {feature}"));
        }
    }

    fn wrong(&mut self, key: &str, given: impl Display, wanted: impl Display) {
        self.problem(key, format!("= {} must be {wanted}", given.to_string().trim()));
    }

    /// Visits a key: takes its value from the document, if it is there, and checks the value. A value that cannot be used
    /// is reported, and the default stays. `show` gives a value as TOML; `None` stands for no value.
    pub(super) fn visit<T: Clone>(
        &mut self,
        of: Described,
        value: &mut T,
        parse: impl FnOnce(&Item) -> Result<T, String>,
        check: impl FnOnce(&T) -> Result<(), String>,
        show: impl Fn(&T) -> Option<String>,
    ) {
        let Described { key, kind, values, help } = of;
        let effect = std::mem::replace(&mut self.effect, Effect::Result);
        let default = show(value).unwrap_or_else(|| "none".into());
        let before = value.clone();
        let item = self.keys.document.item(self.name, key).cloned();
        match item.as_ref().map(parse) {
            Some(Ok(given)) => *value = given,
            Some(Err(wanted)) => self.wrong(key, item.as_ref().map_or_else(String::new, Item::to_string), wanted),
            None => {}
        }
        if let Err(wanted) = check(value) {
            let given = item.map_or_else(|| show(value).unwrap_or_default(), |item| item.to_string());
            self.wrong(key, given, wanted);
            *value = before;
        }
        let value = show(value);
        self.keys.all.push(Key { section: self.name, name: key, kind, default, values, help, effect, value });
    }

    /// A floating-point number.
    pub fn number(&mut self, key: &'static str, value: &mut f64, range: Range, help: &'static str) {
        self.visit(
            Described { key, kind: Kind::Number(range), values: range.to_string(), help },
            value,
            |item| number_of(item).ok_or_else(|| "a number".into()),
            |x| if range.holds(*x) { Ok(()) } else { Err(range.to_string()) },
            |x| Some(format!("{x:?}")),
        );
    }

    /// A floating-point number of which 0 stands for none.
    pub fn number_or_none(&mut self, key: &'static str, value: &mut Option<f64>, range: Range, help: &'static str) {
        let mut number = value.unwrap_or(0.0);
        self.number(key, &mut number, range, help);
        *value = (number != 0.0).then_some(number);
    }

    /// A whole number. The range is given in floats and checked on them; the number itself stays whole.
    pub fn integer<T>(&mut self, key: &'static str, value: &mut T, range: Range, help: &'static str)
    where
        T: Copy + TryFrom<i64> + TryInto<i64>,
    {
        let whole = |x: &T| (*x).try_into().ok();
        self.visit(
            Described { key, kind: Kind::Integer(range), values: range.to_string(), help },
            value,
            |item| {
                let given = item.as_integer().ok_or("a whole number")?;
                T::try_from(given).map_err(|_| range.to_string())
            },
            |x| match whole(x) {
                Some(n) if range.holds(n as f64) => Ok(()),
                Some(_) => Err(range.to_string()),
                None => Err(format!("at most {}", i64::MAX)),
            },
            |x| whole(x).map(|n: i64| n.to_string()),
        );
    }

    /// A duration in whole seconds.
    pub fn seconds(&mut self, key: &'static str, value: &mut Duration, range: Range, help: &'static str) {
        let mut seconds = value.as_secs();
        self.integer(key, &mut seconds, range, help);
        *value = Duration::from_secs(seconds);
    }

    /// `true` or `false`.
    pub fn flag(&mut self, key: &'static str, value: &mut bool, help: &'static str) {
        self.visit(
            Described { key, kind: Kind::Flag, values: "true or false".into(), help },
            value,
            |item| item.as_bool().ok_or_else(|| "true or false".into()),
            |_| Ok(()),
            |x| Some(x.to_string()),
        );
    }

    /// One of several words.
    pub fn choice<T: Copy + PartialEq>(
        &mut self,
        key: &'static str,
        value: &mut T,
        choices: &[(&'static str, T)],
        help: &'static str,
    ) {
        self.choice_or_hint(key, value, choices, help, &|_| String::new());
    }

    /// As [`Section::choice`]. `hint` continues the message on a value by what it is called here, or is empty.
    pub fn choice_or_hint<T: Copy + PartialEq>(
        &mut self,
        key: &'static str,
        value: &mut T,
        choices: &[(&'static str, T)],
        help: &'static str,
        hint: &dyn Fn(&str) -> String,
    ) {
        let names: Vec<&'static str> = choices.iter().map(|(name, _)| *name).collect();
        let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let one_of = |near: String| format!("one of {}{near}", quoted.join(", "));
        self.visit(
            Described { key, kind: Kind::Choice(names.clone()), values: quoted.join(", "), help },
            value,
            |item| {
                let found = choices.iter().find(|(name, _)| Some(*name) == item.as_str());
                let given = item.as_str().unwrap_or_default();
                let near = || match hint(given) {
                    hint if hint.is_empty() => nearest(given, names.iter().copied()),
                    hint => hint,
                };
                found.map(|(_, value)| *value).ok_or_else(|| one_of(near()))
            },
            |x| if choices.iter().any(|(_, value)| value == x) { Ok(()) } else { Err(one_of(String::new())) },
            |x| choices.iter().find(|(_, value)| value == x).map(|(name, _)| format!("\"{name}\"")),
        );
    }

    /// A text that may be absent.
    pub fn text(&mut self, key: &'static str, value: &mut Option<String>, values: &str, help: &'static str) {
        self.parsed(key, value, values, "a text in quotes", help);
    }

    /// A text with a default.
    pub fn text_or(&mut self, key: &'static str, value: &mut String, values: &str, help: &'static str) {
        self.visit(
            Described { key, kind: Kind::Text, values: values.into(), help },
            value,
            |item| item.as_str().map(String::from).ok_or_else(|| "a text in quotes".into()),
            |_| Ok(()),
            |text| Some(quoted(text)),
        );
    }

    /// A value written as a text, such as an address or a device; it may be absent. `wanted` says what a text that cannot
    /// be parsed must be.
    pub fn parsed<T>(
        &mut self,
        key: &'static str,
        value: &mut Option<T>,
        values: &str,
        wanted: &'static str,
        help: &'static str,
    ) where
        T: Clone + FromStr + Display,
        T::Err: Display,
    {
        self.visit(
            Described { key, kind: Kind::Text, values: values.into(), help },
            value,
            |item| {
                let text = item.as_str().ok_or(wanted)?;
                text.parse().map(Some).map_err(|e| format!("{wanted} ({e})"))
            },
            |_| Ok(()),
            |x| x.as_ref().map(|x| quoted(&x.to_string())),
        );
    }

    /// One value written as a text, or a list of them; none may be given. `wanted` says what a text that cannot be parsed
    /// must be.
    pub fn one_or_more<T>(
        &mut self,
        key: &'static str,
        value: &mut Vec<T>,
        values: &str,
        wanted: &'static str,
        help: &'static str,
    ) where
        T: Clone + FromStr + Display,
        T::Err: Display,
    {
        let one = |text: &str| text.parse().map_err(|e| format!("{wanted} ({e})"));
        self.visit(
            Described { key, kind: Kind::TextOrTexts, values: values.into(), help },
            value,
            |item| match item.as_str() {
                Some(text) => Ok(vec![one(text)?]),
                None => list_of(item, |v| v.as_str().map(one)).ok_or(wanted)?.into_iter().collect(),
            },
            |_| Ok(()),
            |all| match all.as_slice() {
                [] => None,
                [only] => Some(quoted(&only.to_string())),
                all => Some(format!("[{}]", all.iter().map(|x| quoted(&x.to_string())).collect::<Vec<_>>().join(", "))),
            },
        );
    }

    /// A list of texts.
    pub fn texts(&mut self, key: &'static str, value: &mut Vec<String>, values: &str, help: &'static str) {
        self.visit(
            Described { key, kind: Kind::Texts, values: values.into(), help },
            value,
            |item| list_of(item, |v| v.as_str().map(String::from)).ok_or_else(|| "a list of texts".into()),
            |_| Ok(()),
            |list| Some(format!("[{}]", list.iter().map(|x| quoted(x)).collect::<Vec<_>>().join(", "))),
        );
    }

    /// A list of finite numbers.
    pub fn numbers(&mut self, key: &'static str, value: &mut Vec<f64>, values: &str, help: &'static str) {
        self.visit(
            Described { key, kind: Kind::Numbers, values: values.into(), help },
            value,
            |item| {
                list_of(item, |v| v.as_float().or(v.as_integer().map(|n| n as f64))).ok_or("a list of numbers".into())
            },
            |list| if list.iter().all(|x| x.is_finite()) { Ok(()) } else { Err("a list of finite numbers".into()) },
            |list| Some(format!("{list:?}")),
        );
    }
}

fn number_of(item: &Item) -> Option<f64> {
    item.as_float().or(item.as_integer().map(|n| n as f64))
}

pub(super) fn list_of<T>(item: &Item, one: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    item.as_array()?.iter().map(one).collect()
}

/// A text as TOML.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string().trim().to_string()
}
