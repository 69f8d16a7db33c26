//! Values given beside a document: `--set section.key=value`.

use toml_edit::{DocumentMut, Item, Table, Value};

use super::problem::{ConfigError, Problem};

/// A document with values set: `section.key=value`, or `stage.2.section.key=value` for the second of several stages. A value is
/// TOML, or a text without its quotes. Other lines stay as they are; whether a key exists and takes the value is found when the
/// document is read.
///
/// # Errors
///
/// For what has another form, and stages that the document does not have.
pub fn with_values(source: &str, values: &[String]) -> Result<String, ConfigError> {
    // A document that cannot be parsed is refused, with its line, when it is read.
    let Ok(mut document) = source.parse::<DocumentMut>() else { return Ok(source.into()) };
    let mut problems = Vec::new();
    for given in values {
        if let Err(message) = set(&mut document, given) {
            problems.push(Problem { line: 0, message: format!("`--set {given}` {message}") });
        }
    }
    if problems.is_empty() { Ok(document.to_string()) } else { Err(ConfigError::new(problems)) }
}

fn set(document: &mut DocumentMut, given: &str) -> Result<(), String> {
    let form = || "must be `section.key=value`, or `stage.2.section.key=value`".to_string();
    let (path, value) = given.split_once('=').ok_or_else(form)?;
    let parts: Vec<&str> = path.trim().split('.').collect();
    let (within, section, key): (&mut Table, &str, &str) = match parts.as_slice() {
        ["stage", number, section, key] => (stage(document, number)?, section, key),
        ["stage", number, key] => return put(stage(document, number)?, key, value),
        [section, key] => (document.as_table_mut(), section, key),
        _ => return Err(form()),
    };
    let section = within.entry(section).or_insert_with(|| Item::Table(Table::new()));
    put(section.as_table_mut().ok_or("names something that is no section")?, key, value)
}

/// A stage by its number, from 1.
fn stage<'a>(document: &'a mut DocumentMut, number: &str) -> Result<&'a mut Table, String> {
    let stages = document.get_mut("stage").and_then(Item::as_array_of_tables_mut);
    let count = stages.as_ref().map_or(0, |stages| stages.len());
    let at = number.parse::<usize>().ok().and_then(|n| n.checked_sub(1));
    stages
        .zip(at)
        .and_then(|(stages, at)| stages.get_mut(at))
        .ok_or_else(|| format!("names stage `{number}`; the file has {count} stages"))
}

fn put(table: &mut Table, key: &str, value: &str) -> Result<(), String> {
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("names the key `{key}`, which is none"));
    }
    let value = value.trim();
    let parsed = value.parse::<Value>().unwrap_or_else(|_| Value::from(value));
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            // The comment after the old value stays.
            let decor = old.decor().clone();
            *old = parsed;
            *old.decor_mut() = decor;
        }
        None => drop(table.insert(key, Item::Value(parsed))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_all(source: &str, values: &[&str]) -> Result<String, String> {
        with_values(source, &values.iter().map(|v| v.to_string()).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn values_are_set_and_the_rest_stays() {
        let source = "# mine\n[job]\nsteps = 5 # few\n\n[loss]\nbeta = 0.1\n";
        let values = ["job.steps=7", "loss.kind=ipo", "optimizer.learning_rate=1e-5", "reward.rules=[\"matches\"]"];
        let wanted = "# mine\n[job]\nsteps = 7 # few\n\n[loss]\nbeta = 0.1\nkind = \"ipo\"\n\n[optimizer]\nlearning_rate = 1e-5\n\n\
                      [reward]\nrules = [\"matches\"]\n";
        assert_eq!(set_all(source, &values).unwrap(), wanted);
        // Texts need no quotes, and may have them.
        let texts = ["job.directory=runs/b", "metrics.listen = 127.0.0.1:9464", "people.token_env='TOKEN'"];
        let set = set_all("", &texts).unwrap();
        for line in ["directory = \"runs/b\"", "listen = \"127.0.0.1:9464\"", "token_env = 'TOKEN'"] {
            assert!(set.contains(line), "{line} is not in\n{set}");
        }
    }

    #[test]
    fn stages_are_named_by_number() {
        let source = "[[stage]]\nalgorithm = \"sft\"\n[[stage]]\nalgorithm = \"ppo\"\n[stage.ppo]\ngamma = 1.0\n";
        let set = set_all(source, &["stage.2.ppo.gamma=0.5", "stage.1.steps=3", "stage.1.data.batch_size=2"]).unwrap();
        let parsed: DocumentMut = set.parse().unwrap();
        assert_eq!(parsed["stage"][1]["ppo"]["gamma"].as_float(), Some(0.5));
        assert_eq!(parsed["stage"][0]["steps"].as_integer(), Some(3));
        assert_eq!(parsed["stage"][0]["data"]["batch_size"].as_integer(), Some(2));
        let refused = set_all(source, &["stage.3.ppo.gamma=1", "stage.x.steps=1"]).unwrap_err();
        assert!(
            refused.contains("names stage `3`; the file has 2 stages") && refused.contains("stage `x`"),
            "{refused}"
        );
    }

    #[test]
    fn other_forms_are_refused_all_at_once() {
        let refused =
            set_all("stray = 1\n", &["steps=3", "job.steps", "job.a b=1", "stray.key=2", "a.b.c=1"]).unwrap_err();
        assert_eq!(refused.matches("--set").count(), 5, "{refused}");
    }
}
