//! The command line. The only place that prints, handles signals and sets up logging.

mod evaluate;
mod export;
mod generate;
mod label;
mod progress;
mod run;
mod saved;
mod status;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Error;

/// Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 3 `verify` found damage, 130 stopped by a signal.
const FAILED: u8 = 1;
const WRONG_INPUT: u8 = 2;
const DAMAGED: u8 = 3;
const STOPPED: u8 = 130;

#[derive(Parser)]
#[command(name = "rehearsal", version, about = "Aligns language models: SFT, reward models, PPO, DPO and its relatives, with exact resume", after_help = EXAMPLES)]
struct Cli {
    /// Log more to standard error (RUST_LOG refines it).
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  rehearsal run examples/quickstart.toml      a whole job on the embedded model, in a minute
  rehearsal resume runs/quickstart            go on after a crash, a kill or a polite stop (Ctrl-C)
  rehearsal status runs/quickstart            how far it is, from another terminal
  rehearsal generate runs/quickstart 'What does the fox do?'
  rehearsal export runs/quickstart --model out/ --ledger pairs.jsonl
  rehearsal verify runs/quickstart            check every checksum
  rehearsal label labels --items answers.jsonl
  rehearsal evaluate models runs/quickstart embedded --prompts p.jsonl --judge-model judge/

Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 3 verify found damage, 130 stopped by a signal.";

#[derive(Subcommand)]
enum Command {
    /// Run a job from its configuration.
    Run {
        /// The job's TOML file; docs/config.md lists every key.
        config: PathBuf,
    },
    /// Go on with a job that was cut off or stopped.
    Resume {
        /// The job's directory.
        directory: PathBuf,
        /// Read the configuration from here, not from the copy in the directory.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Say how far a job is, whether it runs or not.
    Status {
        /// The job's directory.
        directory: PathBuf,
    },
    /// Answer a prompt with a model, or with the newest checkpoint of a job.
    Generate {
        /// A Hugging Face directory, a .gguf file, a job's directory, or `embedded`.
        model: String,
        prompt: String,
        #[arg(long, default_value_t = 64)]
        max_new_tokens: usize,
        /// 0 takes the likeliest token each time.
        #[arg(long, default_value_t = 0.7)]
        temperature: f64,
        #[arg(long, default_value_t = 1.0)]
        top_p: f64,
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// System message.
        #[arg(long)]
        system: Option<String>,
    },
    /// Measure reward models, judges and models.
    #[command(subcommand)]
    Evaluate(evaluate::Evaluate),
    /// Write a job's model or ledger in the ecosystem's formats.
    Export(export::Export),
    /// Add preferences from files in TRL's columns to a ledger, which jobs can learn from.
    Import {
        /// A directory; made where there is none.
        directory: PathBuf,
        /// JSON Lines or Parquet with `prompt`, `chosen` and `rejected`, or `completions` and `ranks`, or `completion`.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Who judged, for rows that do not say so.
        #[arg(long, default_value = "imported")]
        judge: String,
    },
    /// Serve a page on which people rank answers from best to worst, or write their own.
    Label(label::Label),
    /// Check every checksum of a job's store.
    Verify {
        /// The job's directory.
        directory: PathBuf,
    },
    /// Make the embedded model again from text this program generates.
    MakeEmbedded {
        #[arg(long, default_value = "runtime/embedded")]
        out: PathBuf,
        #[arg(long, default_value_t = 1200)]
        steps: u64,
    },
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log(cli.verbose);
    let result = match cli.command {
        Command::Run { config } => run::run(&config),
        Command::Resume { directory, config } => run::resume(&directory, config.as_deref()),
        Command::Status { directory } => status::status(&directory),
        Command::Generate { model, prompt, max_new_tokens, temperature, top_p, seed, system } => {
            let settings = generate::Settings { max_new_tokens, temperature, top_p, seed, system };
            generate::generate(&model, &prompt, &settings)
        }
        Command::Evaluate(what) => evaluate::evaluate(what),
        Command::Export(export) => export::export(export),
        Command::Import { directory, files, judge } => export::import(&directory, &files, &judge),
        Command::Label(settings) => label::label(settings),
        Command::Verify { directory } => status::verify(&directory),
        Command::MakeEmbedded { out, steps } => make_embedded(&out, steps),
    };
    result.unwrap_or_else(|e| {
        eprintln!("error: {e}");
        ExitCode::from(exit_code(&e))
    })
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Config(_) | Error::Prompts { .. } | Error::NoReward | Error::Rules(_) | Error::Exists(_) => WRONG_INPUT,
        Error::Usage(_) | Error::NothingToResume(_) | Error::Changed { .. } | Error::Model(_) => WRONG_INPUT,
        _ => FAILED,
    }
}

fn log(verbose: bool) {
    let level = if verbose { "info,rehearsal=debug" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}

fn make_embedded(out: &std::path::Path, steps: u64) -> crate::Result<ExitCode> {
    let made = crate::embedded::make::make(out, steps, &mut |step, loss| {
        if step % 50 == 0 || step + 1 == steps {
            println!("step {step:5}  loss {loss:.4}");
        }
    });
    match made {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) => Err(Error::State(e.to_string())),
    }
}
