//! Chat templates in Jinja, rendered as in `transformers`. They come with models that anybody may have made, so they have
//! limits: length, steps, and size of what they render.

use std::fmt::Write as _;
use std::sync::Arc;

use chrono::NaiveDate;
use chrono::format::{Item, StrftimeItems};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl Message {
    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// Longest source of a template in bytes.
const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Most steps of a rendering.
const STEPS_MAX: u64 = 10_000_000;
/// Longest text that is rendered, in bytes.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Stack of the thread that compiles: the compiler calls itself for each nested expression, and a source of the longest
/// kind can nest one in every second byte.
const STACK_BYTES: usize = 256 << 20;

/// An environment for templates of others.
pub fn sandbox() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(STEPS_MAX));
    environment
}

/// Adds a template to an environment. The error says why that is not possible.
pub fn compile(
    mut environment: Environment<'static>,
    name: &'static str,
    source: String,
) -> std::result::Result<Environment<'static>, String> {
    if source.len() > SOURCE_BYTES_MAX {
        return Err(format!("it has {} bytes; {SOURCE_BYTES_MAX} are the most", source.len()));
    }
    let compile = move || match environment.add_template_owned(name, source) {
        Ok(()) => Ok(environment),
        Err(e) => Err(format!("does not compile: {e:#}")),
    };
    let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK_BYTES).spawn(compile);
    let thread = thread.map_err(|e| format!("the system starts no thread to compile it: {e}"))?;
    thread.join().unwrap_or_else(|_| Err("the compiler failed".into()))
}

/// Renders a template of an environment, within the limits.
pub fn render<V: Serialize>(
    environment: &Environment<'_>,
    name: &str,
    values: V,
) -> std::result::Result<String, minijinja::Error> {
    let mut text = Bounded(Vec::new());
    environment.get_template(name)?.render_captured_to(values, &mut text)?;
    // Templates write whole strings.
    Ok(String::from_utf8_lossy(&text.0).into_owned())
}

/// A text that does not grow beyond its limit.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(std::io::Error::other(format!("the text is longer than {} MB", TEXT_BYTES_MAX >> 20)));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Python's methods of strings and lists.
fn method(
    state: &minijinja::State<'_, '_>,
    value: &minijinja::Value,
    name: &str,
    arguments: &[minijinja::Value],
) -> std::result::Result<minijinja::Value, minijinja::Error> {
    // Between all characters and around them, as in Python.
    if let ("count", Some(text), Some("")) = (name, value.as_str(), arguments.first().and_then(|a| a.as_str())) {
        return Ok(minijinja::Value::from(text.chars().count() + 1));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// A day in a format of C's `strftime`; its time is midnight.
fn strftime(day: u32, format: &str) -> std::result::Result<String, minijinja::Error> {
    let wrong = |reason: &str| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {reason}"));
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        return Err(wrong(&format!("`{format}` is no format of a date")));
    }
    let days = chrono::Days::new(u64::from(day));
    let date = NaiveDate::from_ymd_opt(1970, 1, 1).and_then(|epoch| epoch.checked_add_days(days));
    let date = date.and_then(|date| date.and_hms_opt(0, 0, 0)).ok_or_else(|| wrong("the day is out of range"))?;
    let mut text = String::new();
    // A time zone, say, cannot be written.
    write!(text, "{}", date.format_with_items(items.iter())).map_err(|_| wrong("it has no time zone"))?;
    Ok(text)
}

/// The source without `{% generation %}` and `{% endgeneration %}`, which mark the tokens that transformers computes the loss
/// on; they print nothing.
fn without_generation(source: &str) -> String {
    let (mut kept, mut rest) = (String::new(), source);
    while let Some(start) = rest.find("{%") {
        let begin = start + 2;
        let Some(len) = rest[begin..].find("%}") else { break };
        let (inner, end) = (&rest[begin..begin + len], begin + len + 2);
        let tag = inner.trim_matches(['-', '+', ' ', '\n', '\t']);
        if tag == "generation" || tag == "endgeneration" {
            kept.push_str(&rest[..start]);
            // A comment keeps what the tag does to the white space around it.
            let sign = |c: Option<char>| c.filter(|c| matches!(c, '-' | '+')).map(String::from).unwrap_or_default();
            kept.push_str(&format!("{{#{}{}#}}", sign(inner.chars().next()), sign(inner.chars().last())));
        } else {
            kept.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    kept + rest
}

/// A compiled chat template, with the special tokens that it may use.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts of its special tokens.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = sandbox();
        // As in transformers: trim_blocks, lstrip_blocks, and Python's methods on strings and lists.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(method);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let environment = compile(environment, "chat", without_generation(source)).map_err(Error::Template)?;
        Ok(Self { environment: Arc::new(environment), bos: bos.into(), eos: eos.into() })
    }

    /// The same template with a date for its function `strftime_now`: so many days after 1 January 1970. Without one the
    /// function is not defined.
    pub fn with_day(mut self, day: u32) -> Self {
        let mut environment = (*self.environment).clone();
        environment.add_function("strftime_now", move |format: String| strftime(day, &format));
        self.environment = Arc::new(environment);
        self
    }

    /// The template of a `tokenizer_config.json`: a string, or the entry named `default` of a list.
    pub(crate) fn from_config(config: &Value) -> Result<Option<Self>> {
        let source = match &config["chat_template"] {
            Value::String(source) => Some(source.as_str()),
            Value::Array(named) => named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()),
            _ => None,
        };
        // A special token is a string, or an object with a `content`.
        let token =
            |key: &str| config[key].as_str().or(config[key]["content"].as_str()).unwrap_or_default().to_string();
        source.map(|source| Self::new(source, &token("bos_token"), &token("eos_token"))).transpose()
    }

    /// Renders a conversation to text; `add_generation_prompt` opens the assistant's turn at the end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let error = |e: minijinja::Error| match e.detail() {
            Some(detail) => Error::Template(detail.to_string()),
            None => Error::Template(format!("{e:#}")),
        };
        let values = context! { messages, add_generation_prompt, bos_token => self.bos, eos_token => self.eos };
        render(&self.environment, "chat", values).map_err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&[Message::user("Hello")], true)
    }

    #[test]
    fn what_transformers_compiles_compiles() {
        let marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}";
        assert_eq!(rendered(marked).unwrap(), "Hello");
        let spaced =
            "{% for m in messages %}\n  {%- generation -%}\n {{ m.content }} {% endgeneration %}\n{% endfor %}";
        assert_eq!(rendered(spaced).unwrap(), "Hello ");
        assert_eq!(rendered("{{ 'abc'.count('') }} {{ 'abab'.count('ab') }}").unwrap(), "4 2");
    }

    #[test]
    fn the_date_is_the_one_that_was_given() {
        let source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}none{% endif %}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        assert_eq!(template.render(&[], true).unwrap(), "none");
        assert_eq!(template.with_day(20_784).render(&[], true).unwrap(), "27 Nov 2026");
        for format in ["%Q", "%Z %z"] {
            let source = format!("{{{{ strftime_now('{format}') }}}}");
            let error = ChatTemplate::new(&source, "", "").unwrap().with_day(1).render(&[], true).unwrap_err();
            assert!(error.to_string().contains("strftime_now"), "{error}");
        }
    }

    #[test]
    fn no_template_takes_more_than_its_limits() {
        for source in [
            format!("{{{{ {} true }}}}", "not ".repeat(100_000)),
            format!("{{{{ {} true }}}}", "not ".repeat(15_000)),
            format!("{{{{ {}1 }}}}", "-".repeat(60_000)),
            format!("{{{{ 1{} }}}}", "+1".repeat(30_000)),
            format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000)),
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
            "{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}".into(),
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
            "{{ ('%' ~ 999999999 ~ 'd') % 1 }}".into(),
        ] {
            // An error, or a text: never a crash, nor memory or time without end.
            let _ = rendered(&source);
        }
        assert!(rendered(&"x".repeat(70_000)).unwrap_err().to_string().contains("65536"));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(rendered(endless).is_err());
    }
}
