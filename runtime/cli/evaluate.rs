//! `rehearsal evaluate`: reward models, judges, comparisons and ratings.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use rehearsal_actors::{Devices, Placement, Reward, RewardModel, RewardModels};
use rehearsal_learn::reward::Ensemble;
use rehearsal_lm::{Message, Precision};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::print::say;
use super::saved;
use crate::error::{At, Error, Result};
use crate::evaluate::{self, CompareOptions};
use crate::judge::{
    ApiJudge, ApiSettings, Budget, Endpoint, Judge, JudgeModel, JudgeReward, LocalJudge, Mode, Orders, Prices,
    ReplyFormat, Template,
};
use crate::time::today;
use crate::transformers::CausalModel;

#[derive(Subcommand)]
pub enum Evaluate {
    /// Measure the accuracy of a reward model on labelled pairs, by subset and by section of RewardBench
    #[command(after_help = "Example:
  rehearsal evaluate reward-model runs/reward_model pairs.jsonl --json report.json")]
    RewardModel {
        /// Model directory with a `score` head, or the directory of a job that trained one
        model: String,
        /// File of rows with `prompt`, `chosen`, `rejected` and optionally `subset`
        file: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Measure the agreement of a judge with labelled pairs, and its position bias
    #[command(after_help = "Example:
  rehearsal evaluate judge pairs.jsonl --judge-model judge/ --template brief")]
    Judge {
        /// File of rows with `prompt`, `first`, `second` and `verdict` (`1`, `2` or `tie`)
        file: PathBuf,
        #[command(flatten)]
        judge: JudgeOptions,
        /// Read only the first rows of the file
        #[arg(long, value_name = "ROWS", default_value_t = usize::MAX, hide_default_value = true)]
        limit: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Measure the win rate of one model against another on the same prompts
    #[command(after_help = "Examples:
  rehearsal evaluate models runs/quickstart embedded --prompts p.jsonl --judge-model judge/
  rehearsal evaluate models runs/ppo runs/sft --prompts p.jsonl --reward-model runs/reward_model --html report.html

The judge or the reward model scores both completions of each prompt; name one of them.")]
    Models {
        /// Model whose win rate is measured: Hugging Face directory, .gguf file, directory of a job, or `embedded`
        first: String,
        /// Model that it is compared with
        second: String,
        /// File of rows with `prompt`
        #[arg(long)]
        prompts: PathBuf,
        /// Score by this reward model instead of a judge
        #[arg(long)]
        reward_model: Option<String>,
        #[command(flatten)]
        judge: JudgeOptions,
        /// Use only the first prompts of the file
        #[arg(long, value_name = "PROMPTS", default_value_t = 100)]
        limit: usize,
        /// Longest completion in tokens
        #[arg(long, default_value_t = 128)]
        max_new_tokens: usize,
        /// Sampling temperature; 0 is greedy decoding
        #[arg(long, default_value_t = 0.7)]
        temperature: f64,
        /// Seed of sampling and of the bootstrap interval
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Largest difference of scores that counts as a tie
        #[arg(long, default_value_t = 0.0)]
        tie: f64,
        /// Write a report with plots and completions to this HTML file
        #[arg(long)]
        html: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// Rate many models by Bradley-Terry and Elo from pairwise comparisons
    #[command(after_help = "Example:
  rehearsal evaluate ratings games.jsonl")]
    Ratings {
        /// File of rows with `model_a`, `model_b` and `winner` (`model_a`, `model_b` or `tie`)
        file: PathBuf,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
pub struct Output {
    /// Write the result as JSON to this file; `-` is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Type of weights and matrix products
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
}

impl Output {
    fn precision(&self) -> Precision {
        if self.dtype == "bf16" { Precision::Bf16 } else { Precision::F32 }
    }

    /// Prints the numbers of a report, and writes it as JSON if that is requested.
    fn show(&self, report: &impl Serialize) -> Result<ExitCode> {
        let value = serde_json::to_value(report).map_err(|e| Error::Internal(e.to_string()))?;
        let text = format!("{value:#}\n");
        match &self.json {
            Some(path) if path == Path::new("-") => {
                print!("{text}");
                return Ok(ExitCode::SUCCESS);
            }
            Some(path) => std::fs::write(path, text).at(path)?,
            None => {}
        }
        for (name, value) in value.as_object().into_iter().flatten().filter(|(name, _)| *name != "results") {
            match value {
                serde_json::Value::Object(map) if map.is_empty() => {}
                serde_json::Value::Object(map) => {
                    say!("{name}");
                    map.iter().for_each(|(name, value)| say!("  {name:28} {}", short(value)));
                }
                value => say!("{name:30} {}", short(value)),
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A value in few digits.
fn short(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(all) => all.iter().map(short).collect::<Vec<_>>().join(" to "),
        value if value.is_f64() => format!("{:.4}", value.as_f64().unwrap_or_default()),
        value => value.to_string(),
    }
}

#[derive(Args)]
pub struct JudgeOptions {
    /// Judge by a local model: Hugging Face directory, .gguf file, directory of a job, or `embedded`
    #[arg(long)]
    judge_model: Option<String>,
    /// Judge by a model behind this OpenAI-compatible `.../chat/completions` URL
    #[arg(long)]
    judge_url: Option<String>,
    /// Model name in requests to that URL
    #[arg(long, default_value = "default")]
    judge_name: String,
    /// Environment variable that holds the API key of that URL
    #[arg(long)]
    token_env: Option<String>,
    /// Criterion of the judge
    #[arg(long, default_value = "helpful", value_parser = crate::judge::NAMES)]
    template: String,
}

impl JudgeOptions {
    /// Opens the judge that the options name.
    fn open(&self, precision: Precision, devices: &Devices) -> Result<(Box<dyn Judge>, Template)> {
        let template = |form| Template::new(&self.template, None, form).map_err(Error::Usage);
        if let Some(name) = &self.judge_model {
            let path = Path::new(name);
            let model = if CausalModel::supports(path) {
                JudgeModel::Transformers(Arc::new(CausalModel::open(path, Some(today())).map_err(Error::Usage)?))
            } else {
                JudgeModel::Native(Arc::new(saved::model(name)?))
            };
            let judge = LocalJudge::new(model, Placement::Cpu, precision, devices).map_err(Error::Usage)?;
            return Ok((Box::new(judge), template(ReplyFormat::Token)?));
        }
        let Some(url) = &self.judge_url else {
            return Err(Error::Usage("no judge is named; add --judge-model or --judge-url".into()));
        };
        let endpoint = Endpoint {
            url: url.clone(),
            token_env: self.token_env.clone(),
            timeout: Duration::from_secs(120),
            retries: 5,
            wait: false,
            concurrency: 4,
        };
        let settings = ApiSettings {
            model: self.judge_name.clone(),
            tokens_max: 512,
            prices: Prices::default(),
            structured: false,
        };
        let judge = ApiJudge::new(settings, endpoint, CancellationToken::new()).map_err(Error::Usage)?;
        Ok((Box::new(judge), template(ReplyFormat::Text)?))
    }
}

/// Runs one of the evaluations.
pub fn evaluate(what: Evaluate) -> Result<ExitCode> {
    match what {
        Evaluate::RewardModel { model, file, output } => {
            let checkpoint = saved::model(&model)?;
            output.show(&evaluate::reward_model(&checkpoint, &file, output.precision(), 0)?)
        }
        Evaluate::Judge { file, judge, limit, output } => {
            let (judge, template) = judge.open(output.precision(), &Devices::new(0)?)?;
            output.show(&evaluate::judge_agreement(&*judge, &template, &file, limit)?)
        }
        Evaluate::Models {
            first,
            second,
            prompts,
            reward_model,
            judge,
            limit,
            max_new_tokens,
            temperature,
            seed,
            tie,
            html,
            output,
        } => {
            let models = [saved::model(&first)?, saved::model(&second)?];
            let devices = Devices::new(0)?;
            let precision = output.precision();
            let reward: Box<dyn Reward> = match &reward_model {
                Some(name) => {
                    let (model, text) = (saved::model(name)?, models[0].text.tokenizer_json());
                    let model =
                        RewardModel::new(name.as_str(), &model, text, Placement::Cpu, precision, 8192, &devices)?;
                    Box::new(RewardModels { members: vec![model], ensemble: Ensemble::Mean, clip: None })
                }
                None => {
                    let (judge, template) = judge.open(precision, &devices)?;
                    Box::new(JudgeReward::new(judge, template, Mode::Pairwise(Orders::Agree), None, Budget::default()))
                }
            };
            let prompts: Vec<Vec<Message>> = crate::data::prompts_of(&prompts)?.into_iter().take(limit).collect();
            let options = CompareOptions { max_new_tokens, temperature, seed, dtype: precision, tie, confidence: 0.95 };
            let report = evaluate::compare([&models[0], &models[1]], &prompts, &*reward, &options)?;
            if let Some(path) = html {
                std::fs::write(&path, evaluate::html(&report, [&first, &second])).at(&path)?;
            }
            output.show(&report)
        }
        Evaluate::Ratings { file, output } => output.show(&evaluate::ratings(&file)?),
    }
}
