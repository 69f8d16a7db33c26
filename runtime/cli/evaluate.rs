//! `rehearsal evaluate`.

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

use super::saved;
use crate::error::{At, Error, Result};
use crate::evaluate::{self, Contest};
use crate::judge::{
    ApiJudge, ApiSettings, Budget, Endpoint, Judge, JudgeModel, JudgeReward, LocalJudge, Mode, Orders, Prices,
    ReplyFormat, Template,
};
use crate::transformers::CausalModel;

#[derive(Subcommand)]
pub enum Evaluate {
    /// Accuracy of a reward model on labelled pairs, by subset and RewardBench section.
    RewardModel {
        /// A directory with a `score` head, or a reward model's job.
        model: String,
        /// Rows with `prompt`, `chosen`, `rejected` and perhaps `subset`.
        file: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// A judge against labels, and against itself in the other order.
    Judge {
        /// Rows with `prompt`, `first`, `second` and `verdict` (`1`, `2`, `tie`).
        file: PathBuf,
        #[command(flatten)]
        judge: WhichJudge,
        /// Rows at most.
        #[arg(long, default_value_t = usize::MAX)]
        limit: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Win rate of one model against another on the same prompts.
    Models {
        first: String,
        second: String,
        /// Rows with `prompt`.
        #[arg(long)]
        prompts: PathBuf,
        /// A trained reward model decides, in the place of a judge.
        #[arg(long)]
        reward_model: Option<String>,
        #[command(flatten)]
        judge: WhichJudge,
        #[arg(long, default_value_t = 100)]
        limit: usize,
        #[arg(long, default_value_t = 128)]
        max_new_tokens: usize,
        #[arg(long, default_value_t = 0.7)]
        temperature: f64,
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// A difference of scores up to this is a tie.
        #[arg(long, default_value_t = 0.0)]
        tie: f64,
        /// Write a page with plots and answers.
        #[arg(long)]
        html: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// Bradley-Terry and Elo ratings of many models.
    Ratings {
        /// Rows with `model_a`, `model_b` and `winner`.
        file: PathBuf,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
pub struct Output {
    /// Write the result as JSON; `-` for standard output.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What products compute in.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
}

impl Output {
    fn precision(&self) -> Precision {
        if self.dtype == "bf16" { Precision::Bf16 } else { Precision::F32 }
    }

    /// Prints the numbers of a report, and writes it where that is asked for.
    fn show(&self, report: &impl Serialize) -> Result<ExitCode> {
        let value = serde_json::to_value(report).map_err(|e| Error::State(e.to_string()))?;
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
                    println!("{name}");
                    map.iter().for_each(|(name, value)| println!("  {name:28} {}", short(value)));
                }
                value => println!("{name:30} {}", short(value)),
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn short(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(all) => all.iter().map(short).collect::<Vec<_>>().join(" to "),
        value if value.is_f64() => format!("{:.4}", value.as_f64().unwrap_or_default()),
        value => value.to_string(),
    }
}

#[derive(Args)]
pub struct WhichJudge {
    /// A local model as judge.
    #[arg(long)]
    judge_model: Option<String>,
    /// The `.../chat/completions` of an OpenAI-compatible judge.
    #[arg(long)]
    judge_url: Option<String>,
    /// What the server calls it.
    #[arg(long, default_value = "default")]
    judge_name: String,
    /// Environment variable with the server's key.
    #[arg(long)]
    token_env: Option<String>,
    #[arg(long, default_value = "helpful", value_parser = crate::judge::NAMES)]
    template: String,
}

impl WhichJudge {
    fn judge(&self, precision: Precision, devices: &Devices) -> Result<(Box<dyn Judge>, Template)> {
        let template = |form| Template::new(&self.template, None, form).map_err(Error::Rules);
        if let Some(name) = &self.judge_model {
            let path = Path::new(name);
            let model = if CausalModel::supports(path) {
                JudgeModel::Transformers(Arc::new(CausalModel::open(path).map_err(Error::Usage)?))
            } else {
                JudgeModel::Native(Arc::new(saved::model(name)?))
            };
            let judge = LocalJudge::new(model, Placement::Cpu, precision, devices).map_err(Error::Rules)?;
            return Ok((Box::new(judge), template(ReplyFormat::Token)?));
        }
        let Some(url) = &self.judge_url else {
            return Err(Error::Usage("say who judges: --judge-model or --judge-url".into()));
        };
        let endpoint = Endpoint {
            url: url.clone(),
            token_env: self.token_env.clone(),
            timeout: Duration::from_secs(120),
            retries: 5,
            wait: false,
            concurrency: 4,
        };
        Ok((
            Box::new(
                ApiJudge::new(
                    ApiSettings {
                        model: self.judge_name.clone(),
                        tokens_max: 512,
                        prices: Prices::default(),
                        structured: false,
                    },
                    endpoint,
                    CancellationToken::new(),
                )
                .map_err(Error::Usage)?,
            ),
            template(ReplyFormat::Text)?,
        ))
    }
}

pub fn evaluate(what: Evaluate) -> Result<ExitCode> {
    match what {
        Evaluate::RewardModel { model, file, output } => {
            let checkpoint = saved::model(&model)?;
            output.show(&evaluate::reward_model(&checkpoint, &file, output.precision(), 0)?)
        }
        Evaluate::Judge { file, judge, limit, output } => {
            let (judge, template) = judge.judge(output.precision(), &Devices::new(0)?)?;
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
                    let (judge, template) = judge.judge(precision, &devices)?;
                    Box::new(JudgeReward::new(judge, template, Mode::Pairwise(Orders::Agree), None, Budget::default()))
                }
            };
            let prompts: Vec<Vec<Message>> = crate::data::prompts_of(&prompts)?.into_iter().take(limit).collect();
            let contest = Contest { max_new_tokens, temperature, seed, dtype: precision, tie, confidence: 0.95 };
            let report = evaluate::compare([&models[0], &models[1]], &prompts, &*reward, &contest)?;
            if let Some(path) = html {
                std::fs::write(&path, evaluate::html(&report, [&first, &second])).at(&path)?;
            }
            output.show(&report)
        }
        Evaluate::Ratings { file, output } => output.show(&evaluate::ratings(&file)?),
    }
}
