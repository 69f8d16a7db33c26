//! The command line. No other module prints, handles signals, sets up logging or exits.

mod check;
mod evaluate;
mod exit;
mod export;
mod generate;
mod init;
#[cfg(feature = "label")]
mod label;
mod list;
#[cfg(feature = "nodes")]
mod node;
mod print;
mod progress;
mod ranks;
mod run;
mod saved;
mod status;
#[cfg(feature = "view")]
mod view;
#[cfg(feature = "view")]
mod watch;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use print::{note, say};
use rehearsal_lm::Message;

use crate::access::Generate;
use crate::error::{Error, Result};

const ABOUT: &str = "Aligns language models by SFT, reward models, PPO, DPO and its relatives, with exact resume";

const EXAMPLES: &str = "Examples:
  rehearsal run examples/quickstart.toml      train the embedded model; about fifteen seconds on two cores
  rehearsal check examples/quickstart.toml    show what a job would do
  rehearsal resume runs/quickstart            continue after a crash, a kill or Ctrl-C
  rehearsal status runs/quickstart            show progress, also while the job runs
  rehearsal view runs                         show curves and answers of all jobs in the browser
  rehearsal generate runs/quickstart 'What does the fox do?'
  rehearsal export runs/quickstart --model out/ --ledger pairs.jsonl
  rehearsal verify runs/quickstart            check every checksum
  rehearsal label labels --items answers.jsonl
  rehearsal evaluate models runs/quickstart embedded --prompts p.jsonl --judge-model judge/

`rehearsal COMMAND --help` shows the options and examples of a command.

Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 3 verify found damage, 130 stopped by a signal.";

#[derive(Parser)]
#[command(name = "rehearsal", version, about = ABOUT, after_help = EXAMPLES)]
struct Cli {
    /// Log more to standard error; RUST_LOG overrides the filter
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Format of the log: lines of text, or JSON objects
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Values in place of a file's.
#[derive(clap::Args)]
struct Values {
    /// A key's value in place of the file's: `section.key=value`, or `stage.2.section.key=value` for the second stage of
    /// several; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a job from its configuration file
    #[command(after_help = "Examples:
  rehearsal run examples/quickstart.toml
  rehearsal run examples/instructgpt.toml     several stages in one file
  rehearsal run job.toml --set job.directory=runs/b --set optimizer.learning_rate=1e-5

Ctrl-C stops the job after a checkpoint; a second Ctrl-C ends it at once. Both can be resumed.")]
    Run {
        /// TOML file of the job; docs/config.md lists every key
        config: PathBuf,
        #[command(flatten)]
        values: Values,
    },
    /// Read everything that a job reads, and show what it would do; nothing is written
    #[command(after_help = "Example:
  rehearsal check job.toml --set optimizer.learning_rate=1e-5")]
    Check {
        /// TOML file of the job
        config: PathBuf,
        #[command(flatten)]
        values: Values,
    },
    /// Write a commented configuration to start from
    Init(init::Init),
    /// Continue a job that was interrupted or stopped, with the same result as if it had not been
    #[command(after_help = "Examples:
  rehearsal resume runs/quickstart
  rehearsal resume runs/quickstart --set job.steps=200      longer than it was to run
  rehearsal resume runs/quickstart --config examples/quickstart.toml

A key that changes results, marked in docs/config.md, keeps its value: another one is refused by name.")]
    Resume {
        /// Directory of the job
        directory: PathBuf,
        /// Read the configuration from this file instead of the copy in the directory
        #[arg(long)]
        config: Option<PathBuf>,
        #[command(flatten)]
        values: Values,
    },
    /// List the jobs of a directory
    #[command(after_help = "Example:
  rehearsal list runs")]
    List {
        /// Directory whose folders are directories of jobs
        #[arg(default_value = "runs")]
        directory: PathBuf,
    },
    /// Show the progress of a job, its newest metrics and its checkpoints, also while it runs
    #[command(after_help = "Example:
  rehearsal status runs/quickstart")]
    Status {
        /// Directory of the job
        directory: PathBuf,
    },
    /// Generate a completion of a prompt by a model or by the policy of a job
    #[command(after_help = "Examples:
  rehearsal generate embedded 'What does the fox do?'
  rehearsal generate runs/quickstart 'What does the fox do?' --temperature 0

A job that runs answers with its weights of this moment, another with those of its newest checkpoint.")]
    Generate {
        /// Hugging Face directory, .gguf file, directory of a job, or `embedded`
        model: String,
        /// Message of the user
        prompt: String,
        /// Longest completion in tokens
        #[arg(long, default_value_t = 64)]
        max_new_tokens: usize,
        /// Sampling temperature; 0 is greedy decoding
        #[arg(long, default_value_t = 0.7)]
        temperature: f64,
        /// Sample from the most likely tokens whose probabilities add up to this
        #[arg(long, default_value_t = 1.0)]
        top_p: f64,
        /// Seed of sampling
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// System message
        #[arg(long)]
        system: Option<String>,
        /// Special tokens that are written out in the message become those tokens; by default they stay text
        #[arg(long)]
        special_tokens: bool,
    },
    /// Evaluate reward models, judges and models
    #[command(subcommand)]
    Evaluate(evaluate::Evaluate),
    /// Write the model or the preference ledger of a job to files
    Export(export::Export),
    /// Add preferences from files to the ledger of a directory, which jobs can train on
    #[command(after_help = "Example:
  rehearsal import labels pairs.jsonl rankings.parquet --judge anna

A job trains on the ledger by `data.train = [\"labels\"]`.")]
    Import {
        /// Directory of the ledger; created if it does not exist
        directory: PathBuf,
        /// JSON Lines or Parquet files with `prompt`, `chosen`, `rejected`; or `prompt`, `completions`, `ranks`; or
        /// `prompt`, `completion`
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Name of the judge, for rows without a column `judge`
        #[arg(long, default_value = "imported")]
        judge: String,
    },
    /// Serve a page on which people rank completions or write their own
    #[cfg(feature = "label")]
    Label(label::Label),
    /// Generate completions for a job that runs elsewhere
    #[cfg(feature = "nodes")]
    Node(node::Node),
    /// Make the certificates of a job and its nodes
    #[cfg(feature = "nodes")]
    #[command(after_help = "Example:
  rehearsal certificates certificates trainer.example.org 10.0.0.7")]
    Certificates {
        /// Directory to make; it must have no authority yet
        directory: PathBuf,
        /// Names and addresses of the coordinator's machine, beside localhost
        hosts: Vec<String>,
    },
    /// Serve a page that shows jobs: curves, answers with scores and verdicts, and controls
    #[cfg(feature = "view")]
    View(view::View),
    /// Show a job's curves and newest answers in the terminal until it ends
    #[cfg(feature = "view")]
    #[command(after_help = "Example:
  rehearsal watch runs/quickstart")]
    Watch {
        /// Directory of the job
        directory: PathBuf,
    },
    /// Check every checksum of a job's store
    #[command(after_help = "Example:
  rehearsal verify runs/quickstart

The exit code is 3 if a record or a checkpoint is damaged.")]
    Verify {
        /// Directory of the job
        directory: PathBuf,
    },
    /// Print the JSON schema of configurations, for editors that complete and check TOML
    Schema,
    /// Print the completions of a shell
    #[command(after_help = "Example:
  rehearsal completions bash > /etc/bash_completion.d/rehearsal")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one for each command
    #[command(after_help = "Example:
  rehearsal man ~/.local/share/man/man1")]
    Man {
        /// Directory to write to, which must exist
        directory: PathBuf,
    },
    /// Train the embedded model from scratch, on generated text
    MakeEmbedded {
        /// Directory for the model's files
        #[arg(long, default_value = "runtime/embedded")]
        out: PathBuf,
        /// Training steps
        #[arg(long, default_value_t = 1200)]
        steps: u64,
    },
}

/// Parses the arguments, runs the command and returns its exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    set_up_logging(cli.verbose, cli.log_format);
    let result = match cli.command {
        Command::Run { config, values } => run::run(&config, &values.set),
        Command::Check { config, values } => check::check(&config, &values.set),
        Command::Init(settings) => init::init(settings),
        Command::Resume { directory, config, values } => run::resume(&directory, config.as_deref(), &values.set),
        Command::List { directory } => list::list(&directory),
        Command::Status { directory } => status::status(&directory),
        Command::Generate { model, prompt, max_new_tokens, temperature, top_p, seed, system, special_tokens } => {
            let mut request =
                Generate { max_new_tokens, temperature, top_p, seed, special_tokens, ..Generate::new(prompt) };
            request.messages.splice(0..0, system.map(Message::system));
            generate::generate(&model, request)
        }
        Command::Evaluate(what) => evaluate::evaluate(what),
        Command::Export(export) => export::export(export),
        Command::Import { directory, files, judge } => export::import(&directory, &files, &judge),
        #[cfg(feature = "nodes")]
        Command::Node(settings) => node::node(settings),
        #[cfg(feature = "nodes")]
        Command::Certificates { directory, hosts } => node::certificates(&directory, &hosts),
        #[cfg(feature = "label")]
        Command::Label(settings) => label::label(settings),
        #[cfg(feature = "view")]
        Command::View(settings) => view::view(settings),
        #[cfg(feature = "view")]
        Command::Watch { directory } => watch::watch(&directory),
        Command::Verify { directory } => status::verify(&directory),
        Command::Schema => schema(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "rehearsal", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => clap_mangen::generate_to(Cli::command(), &directory)
            .map(|()| ExitCode::SUCCESS)
            .map_err(|source| Error::Io { path: directory, source }),
        Command::MakeEmbedded { out, steps } => make_embedded(&out, steps),
    };
    result.unwrap_or_else(|e| {
        note!("error: {e}");
        ExitCode::from(exit::code(&e))
    })
}

fn schema() -> Result<ExitCode> {
    let schema = serde_json::to_string_pretty(&crate::job::Config::json_schema());
    say!("{}", schema.map_err(|e| Error::Internal(e.to_string()))?);
    Ok(ExitCode::SUCCESS)
}

fn set_up_logging(verbose: bool, format: LogFormat) {
    let level = if verbose { "info,rehearsal=debug" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

fn make_embedded(out: &std::path::Path, steps: u64) -> Result<ExitCode> {
    let made = crate::embedded::make::make(out, steps, &mut |step, loss| {
        if step % 50 == 0 || step + 1 == steps {
            say!("step {step:5}  loss {loss:.4}");
        }
    });
    match made {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) => Err(Error::Internal(e.to_string())),
    }
}
