//! The configuration of a job: what the user typed is read by `reader`, what the program trusts is [`Config`].

pub mod judges;
pub mod methods;
mod reader;
mod reference;
mod schema;
mod stages;

pub use reader::{ConfigError, Problem};
pub use reference::markdown;

use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use judges::{EncoderConfig, JudgeConfig, PeopleConfig, ScorerConfig};
use methods::{
    Algorithm, CriticConfig, DataConfig, LoraSettings, PpoConfig, RewardModelConfig, RewardModelsConfig, RsoConfig,
    UpdateConfig,
};
use rehearsal_actors::{LoraInit, Placement, TrainedConfig};
use rehearsal_learn::{AdamWConfig, NllReduction, PreferenceConfig, Schedule, ScheduleKind, TieRule};
use rehearsal_lm::Precision;
use rehearsal_lm::generate::Sampling;

/// A valid configuration. The reference of all keys is `docs/config.md`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub job: JobConfig,
    pub model: ModelConfig,
    pub data: DataConfig,
    pub sft: NllReduction,
    pub reward_model: RewardModelConfig,
    pub ppo: PpoConfig,
    pub critic: CriticConfig,
    pub update: UpdateConfig,
    pub rso: RsoConfig,
    /// Adapters are trained in the place of the weights.
    pub lora: Option<LoraSettings>,
    pub prompts: PromptsConfig,
    pub rollout: RolloutConfig,
    pub reward: RewardConfig,
    pub judge: Option<JudgeConfig>,
    pub scorer: Option<ScorerConfig>,
    pub encoder: Option<EncoderConfig>,
    pub people: Option<PeopleConfig>,
    pub loss: LossConfig,
    pub optimizer: OptimizerConfig,
    pub evaluation: EvaluationConfig,
    pub checkpoint: CheckpointConfig,
    pub placement: PlacementConfig,
    pub limits: LimitsConfig,
    pub metrics: MetricsConfig,
}

/// `[job]`
#[derive(Debug, Clone, PartialEq)]
pub struct JobConfig {
    pub algorithm: Algorithm,
    /// Where everything the job makes is kept.
    pub directory: PathBuf,
    /// Optimiser steps.
    pub steps: u64,
    pub seed: u64,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The tiny one inside this program.
    Embedded,
    /// A Hugging Face directory or a GGUF file.
    Path(PathBuf),
}

/// `[model]`
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub policy: ModelSource,
    /// The policy's own start where none is named.
    pub reference: ModelSource,
    /// What the factors of matrix products are rounded to, and read-only weights stored as.
    pub dtype: Precision,
}

/// What becomes of a line or prompt that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBad {
    /// The job does not start.
    Fail,
    /// It is left out, and counted.
    Skip,
}

/// `[prompts]`
#[derive(Debug, Clone, PartialEq)]
pub struct PromptsConfig {
    /// JSON Lines with a column `prompt`: a text or a conversation. `None` takes the embedded prompts.
    pub train: Option<PathBuf>,
    pub held_out: Option<PathBuf>,
    /// Column with a reference answer for rules that compare.
    pub answer_column: String,
    /// System message put before prompts that have none.
    pub system: Option<String>,
    /// Prompts are put into the model's chat template.
    pub chat: bool,
    pub on_bad_line: OnBad,
    pub on_long: OnBad,
    /// Tokens of a prompt at most; 0 for what the context leaves.
    pub tokens_max: usize,
}

/// `[rollout]`
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutConfig {
    pub prompts_per_step: usize,
    pub completions_per_prompt: usize,
    pub max_new_tokens: usize,
    pub min_new_tokens: usize,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    /// Sequences generated side by side at most.
    pub batch: usize,
}

/// `[reward]`
#[derive(Debug, Clone, PartialEq)]
pub struct RewardConfig {
    /// Names of rules; empty when the program brings its own reward.
    pub rules: Vec<String>,
    /// One for each rule.
    pub weights: Vec<f64>,
    pub words_min: u64,
    pub words_max: u64,
    pub pattern: Option<String>,
    pub models: RewardModelsConfig,
}

/// `[loss]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossConfig {
    pub preference: PreferenceConfig,
    pub ties: TieRule,
    pub missing_eos_penalty: f64,
}

/// `[optimizer]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerConfig {
    pub adamw: AdamWConfig,
    pub learning_rate: f64,
    pub schedule: ScheduleKind,
    pub warmup_steps: u64,
    pub max_grad_norm: Option<f64>,
    pub micro_batch_tokens: usize,
    /// Activations are computed again on the way back instead of kept.
    pub gradient_checkpointing: bool,
    /// Decay of the average of the weights that is exported in their place.
    pub ema_decay: Option<f64>,
}

/// `[evaluation]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationConfig {
    /// 0: never.
    pub every_steps: u64,
    pub prompts: usize,
    /// Samples shown with each evaluation.
    pub samples: usize,
}

/// `[checkpoint]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckpointConfig {
    pub every_steps: u64,
    pub keep: usize,
}

/// `[placement]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlacementConfig {
    pub policy: Placement,
    pub reference: Placement,
    pub reward: Placement,
    pub critic: Placement,
    /// CPU threads; 0 for all.
    pub threads: usize,
}

/// `[limits]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LimitsConfig {
    /// A role answers within this, or the request fails.
    pub request: Duration,
    pub restarts_max: u32,
    pub rollouts_max: usize,
    pub staleness_max: u64,
    /// Tokens of a step, at most, of which what generation computed is kept for the update.
    pub kept_tokens: usize,
}

/// `[metrics]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricsConfig {
    /// Where Prometheus may scrape; `None` listens nowhere.
    pub listen: Option<SocketAddr>,
}

impl Config {
    /// Reads a file; paths in it are relative to its folder.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let source = std::fs::read_to_string(path).map_err(|e| ConfigError {
            file: path.into(),
            problems: vec![Problem { line: 0, message: format!("cannot be read: {e}") }],
        })?;
        Self::from_toml(&source, &folder_of(path)).map_err(|e| ConfigError { file: path.into(), ..e })
    }

    /// Reads a document of one job; paths in it are relative to `base`. All problems are reported at once.
    pub fn from_toml(source: &str, base: &Path) -> Result<Self, ConfigError> {
        let mut stages = Self::stages(source, base)?;
        match stages.len() {
            1 => Ok(stages.remove(0)),
            n => Err(ConfigError {
                file: "the configuration".into(),
                problems: vec![Problem { line: 0, message: format!("has {n} stages; run it as a chain") }],
            }),
        }
    }

    /// Reads a document of one job, or of several that build on one another (`[[stage]]`).
    pub fn stages(source: &str, base: &Path) -> Result<Vec<Self>, ConfigError> {
        let fail = |problems| ConfigError { file: "the configuration".into(), problems };
        let root = reader::parse(source).map_err(|problem| fail(vec![problem]))?;
        let mut configs: Vec<Self> = Vec::new();
        let mut earlier = stages::Earlier::default();
        let mut problems = Vec::new();
        for stage in stages::split(root, source).map_err(fail)? {
            let mut reader = reader::Reader::new(source, stage.root, earlier.clone());
            let mut config = schema::read(&mut reader, base);
            reader.finish();
            problems.extend(reader.problems);
            if let Some(name) = stage.name {
                config.job.directory.push(&name);
                earlier.add(&name, &config);
            }
            configs.push(config);
        }
        problems.sort_by_key(|p: &Problem| p.line);
        problems.dedup();
        if problems.is_empty() { Ok(configs) } else { Err(fail(problems)) }
    }

    /// Learning rates of the job.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            kind: self.optimizer.schedule,
            peak: self.optimizer.learning_rate,
            warmup_steps: self.optimizer.warmup_steps,
            total_steps: self.job.steps,
        }
    }

    /// Settings of the policy, or of a reward model in training.
    pub(crate) fn trained(&self, placement: Placement) -> TrainedConfig {
        TrainedConfig {
            placement,
            optimizer: self.optimizer.adamw,
            max_grad_norm: self.optimizer.max_grad_norm,
            micro_batch_tokens: self.optimizer.micro_batch_tokens,
            precision: self.model.dtype,
            gradient_checkpointing: self.optimizer.gradient_checkpointing,
            ema_decay: self.optimizer.ema_decay,
            lora: self.lora.as_ref().map(|lora| LoraInit {
                config: lora.config.clone(),
                adapter: lora.adapter.clone(),
                seed: self.job.seed,
            }),
        }
    }

    /// Tokens of a step's completions, at most, of which the policy keeps what it computed for the update on them.
    pub(crate) fn kept_tokens(&self) -> usize {
        match self.job.algorithm {
            // Those that update with the weights that generated.
            Algorithm::OnlineDpo | Algorithm::Ppo if !self.optimizer.gradient_checkpointing => {
                self.limits.kept_tokens.min(self.optimizer.micro_batch_tokens)
            }
            _ => 0,
        }
    }

    /// Completions of a step.
    pub(crate) fn completions_per_step(&self) -> usize {
        self.rollout.prompts_per_step * self.rollout.completions_per_prompt
    }

    /// The settings a resumed job must have in common with the job that was cut off, section by section. What files
    /// hold counts by content, elsewhere; what changes no result is left out.
    pub(crate) fn fingerprint(&self) -> Vec<(String, String)> {
        let section = |name: &str, value: &dyn std::fmt::Debug| (name.to_string(), format!("{value:?}"));
        let data = DataConfig { train: Vec::new(), held_out: None, ..self.data.clone() };
        let prompts = PromptsConfig { train: None, held_out: None, ..self.prompts.clone() };
        let optimizer = OptimizerConfig { micro_batch_tokens: 0, gradient_checkpointing: false, ..self.optimizer };
        let reward = RewardConfig {
            models: RewardModelsConfig { models: Vec::new(), ..self.reward.models.clone() },
            ..self.reward.clone()
        };
        let algorithm = self.job.algorithm;
        let mut all = vec![
            section("job.algorithm", &algorithm.name()),
            section("job.seed", &self.job.seed),
            section("model.dtype", &self.model.dtype),
            section("[optimizer]", &optimizer),
            section("[evaluation]", &self.evaluation),
            section("[lora]", &self.lora.as_ref().map(|lora| &lora.config)),
        ];
        match algorithm {
            Algorithm::Sft => all.extend([section("[data]", &data), section("[sft]", &self.sft)]),
            Algorithm::RewardModel => {
                let settings = RewardModelConfig { demonstrations: None, ..self.reward_model.clone() };
                all.extend([section("[data]", &data), section("[reward_model]", &settings)]);
            }
            Algorithm::Dpo => all.extend([section("[data]", &data), section("[loss]", &self.loss)]),
            _ => all.extend([
                section("[prompts]", &prompts),
                section("[rollout]", &RolloutConfig { batch: 0, ..self.rollout.clone() }),
                section("[reward]", &reward),
                section("[judge]", &self.judge.as_ref().map(|j| (j.source.name(), &j.template, j.mode, j.weight))),
                section("[scorer]", &self.scorer.as_ref().map(|s| s.weight)),
                section("[encoder]", &self.encoder.as_ref().map(|e| e.weight)),
                section("[people]", &self.people.as_ref().map(|p| (p.labels, p.weight))),
            ]),
        }
        match algorithm {
            Algorithm::Ppo => {
                let ppo = PpoConfig { pretraining: None, ..self.ppo.clone() };
                let critic = CriticConfig { model: None, ..self.critic.clone() };
                all.extend([section("[ppo]", &ppo), section("[critic]", &critic), section("[update]", &self.update)]);
            }
            Algorithm::OnlineDpo => all.push(section("[loss]", &self.loss)),
            Algorithm::IterativeDpo => {
                all.extend([section("[loss]", &self.loss), section("[update]", &self.update)]);
            }
            Algorithm::Rso => all.extend([
                section("[loss]", &self.loss),
                section("[update]", &self.update),
                section("[rso]", &self.rso),
            ]),
            _ => {}
        }
        all
    }
}

/// The folder of a file, in full, so that a job means the same from everywhere.
pub(crate) fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.canonicalize().unwrap_or_else(|_| folder.into())
}

/// A path as it was typed, seen from `base`, without `.` and `..` in the middle.
fn resolve(base: &Path, typed: &str) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in base.join(typed).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(resolved.components().next_back(), Some(Component::Normal(_))) => {
                resolved.pop();
            }
            part => resolved.push(part),
        }
    }
    if resolved.as_os_str().is_empty() { ".".into() } else { resolved }
}
