//! A language model as judge, as a source of rewards: `[judge]`.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use super::endpoint::EndpointSettings;
use super::memory::StoreMemory;
use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::blocking::blocking;
use crate::config::{Keys, ModelSource, Range, Settings};
use crate::error::{At, Error, Result};
use crate::features::ENCODERS;
use crate::futures::BoxFuture;
use crate::judge::{
    ApiJudge, ApiSettings, Budget, Judge, JudgeModel, JudgeReward, LocalJudge, Mode, NAMES, Orders, Prices, ReplyCache,
    ReplyFormat, Template,
};
use crate::transformers::CausalModel;

/// `[judge]`
#[derive(Debug, Clone, PartialEq)]
pub struct JudgeSource {
    /// A local model.
    pub model: Option<ModelSource>,
    /// A model behind an OpenAI-compatible endpoint.
    pub endpoint: EndpointSettings,
    /// What the endpoint calls the model.
    pub api_model: Option<String>,
    /// Tokens of a reply at most.
    pub tokens_max: usize,
    /// Whether replies are objects whose form the server enforces.
    pub structured: bool,
    /// Name of the criterion; one of [`NAMES`].
    pub template: String,
    /// A Jinja file in place of the template.
    pub template_file: Option<PathBuf>,
    /// What the judge is asked about the completions of a prompt.
    pub mode: Mode,
    /// Weight of its score beside other sources.
    pub weight: f64,
    /// What the endpoint's tokens cost.
    pub prices: Prices,
    /// What the job may ask and spend in total.
    pub budget: Budget,
}

impl Default for JudgeSource {
    fn default() -> Self {
        Self {
            model: None,
            endpoint: EndpointSettings::default(),
            api_model: None,
            tokens_max: 512,
            structured: false,
            template: "helpful".into(),
            template_file: None,
            mode: Mode::Pairwise(Orders::Average),
            weight: 1.0,
            prices: Prices::default(),
            budget: Budget::default(),
        }
    }
}

impl Settings for JudgeSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("judge");
        s.model(
            "model",
            &mut self.model,
            "A local model as judge: the probabilities of its verdict tokens count. Beside the architectures that can be \
             trained, Hugging Face directories of Phi 3, OLMo 1 and 2, StarCoder 2, Gemma 1, Helium and SmolLM 3, and GGUF \
             files of Qwen 2 and 3, Gemma 2 and 3, Phi 2 and 3, GLM 4 and LFM 2, can judge, on the CPU.",
        );
        s.text("api_model", &mut self.api_model, "a model's name", "Name of the judge's model at `url`.");
        let help = "The OpenAI-compatible `.../chat/completions` of a judge, or the URL without that ending.";
        self.endpoint.visit(&mut s, help);
        s.integer("tokens_max", &mut self.tokens_max, Range::from(1.0), "Tokens of a reply at most.");
        s.choice(
            "reply",
            &mut self.structured,
            &[("words", false), ("object", true)],
            "How a judge behind `url` replies: in words that end with a verdict, or with an object whose form the server \
             enforces (structured outputs, where it has them).",
        );
        let names = "\"helpful\", \"harmless\", \"summary\", \"brief\", \"mt_bench\"";
        s.text_or("template", &mut self.template, names, "The criterion that the judge is asked about.");
        if !NAMES.contains(&self.template.as_str()) {
            s.problem("template", format!("= \"{}\" must be one of {}", self.template, NAMES.join(", ")));
        }
        s.path(
            "template_file",
            &mut self.template_file,
            "A Jinja template of your own, with `question`, `first` and `second` (`answer` for grades, the list `answers` for \
             rankings), which are quoted already.",
        );
        s.choice(
            "mode",
            &mut self.mode,
            &[
                ("average", Mode::Pairwise(Orders::Average)),
                ("agree", Mode::Pairwise(Orders::Agree)),
                ("first_order", Mode::Pairwise(Orders::First)),
                ("rank", Mode::Ranking),
                ("grade", Mode::Grade),
            ],
            "Pairs in both orders, averaged (`average`) or a tie unless both agree (`agree`), or in one order; all completions \
             at once, in order and in reverse (`rank`); or each completion by itself, from 1 to 10.",
        );
        s.number("weight", &mut self.weight, Range::any(), "Weight of its score beside other sources.");
        let help = "Price of a million tokens of questions, in any currency.";
        s.speed().number("price_input", &mut self.prices.input, Range::from(0.0), help);
        let help = "Price of a million tokens of replies.";
        s.speed().number("price_output", &mut self.prices.output, Range::from(0.0), help);
        let budget = &mut self.budget;
        let help = "Questions of the whole job, at most; then it stops with a checkpoint. 0 for any number.";
        s.speed().integer("calls_max", &mut budget.calls, Range::from(0.0), help);
        let help = "The same for tokens, those of questions and replies together, as the server counts them.";
        s.speed().integer("spend_tokens_max", &mut budget.tokens, Range::from(0.0), help);
        let help = "The same for money, by `price_input` and `price_output`.";
        s.speed().number("spend_max", &mut budget.money, Range::from(0.0), help);
        if budget.money > 0.0 && self.prices == Prices::default() {
            let message = "needs `judge.price_input` and `judge.price_output`; without them nothing costs anything";
            s.problem("spend_max", message);
        }
        if self.model.is_some() && self.endpoint.url.is_some() {
            s.problem("url", "and `judge.model` name two judges; one judges");
        }
    }
}

impl JudgeSource {
    fn api(&self) -> ApiSettings {
        ApiSettings {
            model: self.api_model.clone().unwrap_or_else(|| "default".into()),
            tokens_max: self.tokens_max,
            prices: self.prices,
            structured: self.structured,
        }
    }

    fn template(&self) -> Result<Template> {
        let own = self.template_file.as_ref().map(|file| fs::read_to_string(file).at(file)).transpose()?;
        let form = match (&self.model, self.structured) {
            (Some(_), _) => ReplyFormat::Token,
            (None, true) => ReplyFormat::Json,
            (None, false) => ReplyFormat::Text,
        };
        Template::new(&self.template, own, form).map_err(wrong)
    }
}

impl RewardSource for JudgeSource {
    fn name(&self) -> &'static str {
        "judge"
    }

    fn is_configured(&self) -> bool {
        self.model.is_some() || self.endpoint.url.is_some()
    }

    fn load(&self, inputs: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        let model = match &self.model {
            Some(ModelSource::Path(path)) if CausalModel::supports(path) => Some(JudgeModel::Transformers(Arc::new(
                CausalModel::open(path, inputs.models.day()).map_err(Error::Usage)?,
            ))),
            Some(source) => {
                Some(JudgeModel::Native(inputs.models.load(source).map_err(|e| match ENCODERS.enabled {
                    true => e,
                    false => Error::Usage(format!("{e}; a judge of another architecture needs {ENCODERS}")),
                })?))
            }
            None => None,
        };
        if let Some(model) = &model {
            let fingerprint = model.fingerprint().map_err(Error::Usage)?;
            inputs.fingerprint.push(("judge, its weights".into(), fingerprint));
        }
        if let Some(file) = &self.template_file {
            let text = fs::read(file).at(file)?;
            inputs.fingerprint.push(("judge, its template".into(), blake3::hash(&text).to_hex()[..16].into()));
        }
        Ok(Box::new(Loaded { template: self.template()?, model, settings: self.clone() }))
    }
}

/// An error of the judge as a source of rewards.
fn wrong(reason: String) -> Error {
    Error::RewardSource { name: "judge", reason }
}

struct Loaded {
    settings: JudgeSource,
    template: Template,
    model: Option<JudgeModel>,
}

impl LoadedReward for Loaded {
    fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
        Box::pin(async move {
            let Loaded { settings, template, model } = *self;
            let judge: Box<dyn Judge> = match (model, settings.endpoint.endpoint()) {
                (Some(model), _) => {
                    let (placement, dtype, devices) = (context.placement, context.dtype, context.devices.clone());
                    let judge = blocking(move || LocalJudge::new(model, placement, dtype, &devices)).await;
                    Box::new(judge.map_err(wrong)?)
                }
                (None, Some(endpoint)) => {
                    Box::new(ApiJudge::new(settings.api(), endpoint, context.stop.clone()).map_err(wrong)?)
                }
                (None, None) => return Err(wrong("`judge.model` or `judge.url` is missing".into())),
            };
            let memory: Arc<dyn ReplyCache> = Arc::new(StoreMemory::new(context.archivist.clone()));
            let reward = JudgeReward::new(judge, template, settings.mode, Some(memory), settings.budget);
            Ok(StartedReward::new(settings.weight, reward.with_meters(context.meters.clone())))
        })
    }
}
