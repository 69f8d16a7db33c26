//! `rehearsal init`: a commented configuration to start from.

use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use toml_edit::{Array, DocumentMut, Item, Table, value};

use super::print::{note, say};
use crate::config::{Key, folder_of};
use crate::error::{At, Error, Result};
use crate::job::Config;

/// Width of comments.
const COLUMNS: usize = 100;

#[derive(Args)]
#[command(after_help = "Examples:
  rehearsal init                                                       asks
  rehearsal init online_dpo --rules distinct_words,ends_properly
  rehearsal init dpo --model models/SmolLM2-135M --data pairs.jsonl --out dpo.toml

The file has every key of the algorithm with its default and what it does. `rehearsal check FILE` reads what it names.")]
pub struct Init {
    /// Algorithm of the job: sft, reward_model, ppo, dpo, online_dpo, iterative_dpo or rso
    algorithm: Option<String>,
    /// Model to train: a Hugging Face directory or a .gguf file; the embedded one when left out
    #[arg(long)]
    model: Option<String>,
    /// Rows to learn from, or prompts of an online algorithm
    #[arg(long)]
    data: Option<String>,
    /// Rules whose sum is the reward
    #[arg(long, value_delimiter = ',')]
    rules: Vec<String>,
    /// Directory of the job; runs/ALGORITHM when left out
    #[arg(long)]
    directory: Option<String>,
    /// File to write, which must not exist
    #[arg(long, default_value = "job.toml")]
    out: PathBuf,
}

/// Writes the file.
pub fn init(settings: Init) -> Result<ExitCode> {
    let Init { algorithm, mut model, mut data, mut rules, directory, out } = settings;
    let algorithm = match algorithm {
        Some(algorithm) => algorithm,
        None if std::io::stdin().is_terminal() => {
            let algorithm =
                ask("algorithm (sft, reward_model, ppo, dpo, online_dpo, iterative_dpo, rso)", "online_dpo")?;
            model = Some(ask("model to train (a directory or .gguf file)", "embedded")?).filter(|m| m != "embedded");
            data = Some(ask("file of rows or prompts (empty: the embedded prompts)", "")?).filter(|d| !d.is_empty());
            let given = ask("rules of the reward, with commas (empty: none)", "")?;
            rules = given.split(',').map(str::trim).filter(|rule| !rule.is_empty()).map(String::from).collect();
            algorithm
        }
        None => return Err(Error::Usage("name the algorithm, such as `rehearsal init online_dpo`".into())),
    };
    let directory = directory.unwrap_or_else(|| format!("runs/{algorithm}"));
    let learns_from_rows = matches!(algorithm.as_str(), "sft" | "dpo" | "reward_model");
    let mut document = DocumentMut::new();
    let mut set = |section: &str, key: &str, item: Item| {
        let section = document.entry(section).or_insert_with(|| Item::Table(Table::new()));
        if let Some(table) = section.as_table_mut() {
            table.insert(key, item);
        }
    };
    set("job", "directory", value(directory));
    if algorithm == "rso" {
        // It keeps 8 of a prompt's completions.
        set("rollout", "completions_per_prompt", value(16));
    }
    set("job", "algorithm", value(algorithm));
    if let Some(model) = model {
        set("model", "policy", value(model));
    }
    match data {
        Some(data) if learns_from_rows => set("data", "train", value(Array::from_iter([data]))),
        Some(data) => set("prompts", "train", value(data)),
        None => {}
    }
    if !rules.is_empty() {
        set("reward", "rules", value(Array::from_iter(rules)));
    }
    let config = Config::from_toml(&document.to_string(), &folder_of(&out)).map_err(|e| e.in_file(&out))?;
    let text = commented(&document, &config);
    let mut file = std::fs::File::create_new(&out).at(&out)?;
    file.write_all(text.as_bytes()).at(&out)?;
    say!("wrote {}; then: rehearsal check {0} && rehearsal run {0}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// An answer of the user, or the default for an empty one.
fn ask(question: &str, default: &str) -> Result<String> {
    note!("{question} [{default}]:");
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .map_err(|source| Error::Io { path: "standard input".into(), source })?;
    let given = line.trim();
    Ok(if given.is_empty() { default } else { given }.to_string())
}

/// The document with every other key of the job's sections as a comment, with what it does.
fn commented(given: &DocumentMut, config: &Config) -> String {
    let mut out = String::from("# A job of Rehearsal. A key that is commented out has the value shown, or none.\n");
    for (section, keys) in config.used().by_section() {
        let table = given.get(section).and_then(Item::as_table);
        let _ = writeln!(out, "\n{}[{section}]", if table.is_some() { "" } else { "# " });
        for key in keys {
            wrap(&mut out, key);
            match table.and_then(|table| table.get(key.name)) {
                Some(item) => {
                    let _ = writeln!(out, "{} = {}", key.name, item.to_string().trim());
                }
                None => {
                    let shown = key.value.clone().unwrap_or_else(|| format!("... ({})", key.values));
                    let _ = writeln!(out, "# {} = {shown}", key.name);
                }
            }
        }
    }
    out
}

/// What a key does, as lines of a comment.
fn wrap(out: &mut String, key: &Key) {
    let mut line = String::from("##");
    for word in key.help.split_whitespace() {
        if line.len() + 1 + word.len() > COLUMNS {
            let _ = writeln!(out, "{line}");
            line = String::from("##");
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}
