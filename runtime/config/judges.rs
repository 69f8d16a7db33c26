//! `[judge]`, `[scorer]`, `[encoder]` and `[people]`: models, servers and people that know better.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::reader::{Range, Section};
use super::{ModelSource, schema};
use crate::judge::{ApiSettings, Budget, Endpoint, Mode, Orders, Prices};

/// Who judges.
#[derive(Debug, Clone, PartialEq)]
pub enum JudgeSource {
    /// A model of one's own, by the probabilities of its verdict tokens.
    Local(ModelSource),
    /// A model behind an OpenAI-compatible endpoint.
    Api { settings: ApiSettings, endpoint: Endpoint },
}

impl JudgeSource {
    /// Who judges, wherever it runs; a local model's weights count by content, elsewhere.
    pub fn name(&self) -> &str {
        match self {
            Self::Local(_) => "a local model",
            Self::Api { settings, .. } => &settings.model,
        }
    }
}

/// `[judge]`
#[derive(Debug, Clone, PartialEq)]
pub struct JudgeConfig {
    pub source: JudgeSource,
    pub template: String,
    /// A Jinja file in the template's place.
    pub template_file: Option<PathBuf>,
    pub mode: Mode,
    pub weight: f64,
    pub budget: Budget,
}

/// `[scorer]`
#[derive(Debug, Clone, PartialEq)]
pub struct ScorerConfig {
    pub endpoint: Endpoint,
    pub batch: usize,
    pub weight: f64,
}

/// `[encoder]`
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    pub model: PathBuf,
    pub weight: f64,
}

pub(super) fn encoder(mut s: Section<'_>, base: &Path) -> Option<EncoderConfig> {
    let model = s.existing(
        "model",
        base,
        "A BERT in Hugging Face's form: one for sequence classification scores prompt and answer by its logit (of two labels, the log odds of the second); any other, such as MiniLM, scores the cosine of the answer and the prompt's reference answer.",
    );
    let weight = s.number("weight", 1.0, Range::from(f64::MIN), "Weight of its score beside other rewards.");
    model.map(|model| EncoderConfig { model, weight })
}

/// `[people]`
#[derive(Debug, Clone, PartialEq)]
pub struct PeopleConfig {
    /// Where the page is served.
    pub listen: SocketAddr,
    /// Environment variable with the token.
    pub token_env: Option<String>,
    /// Verdicts that every prompt waits for.
    pub labels: usize,
    pub weight: f64,
}

pub(super) fn people(mut s: Section<'_>) -> Option<PeopleConfig> {
    let listen = s.text(
        "listen",
        "an address such as \"127.0.0.1:8765\"",
        "Where people rank the policy's answers in a browser; the job waits for them. An address beyond this machine needs a token, which is made and shown where `token_env` names none.",
    );
    let token_env = s.text(
        "token_env",
        "a variable's name",
        "Environment variable with a token of 16 characters or more; it is never stored or logged.",
    );
    let labels = s.integer(
        "labels",
        1,
        Range::within(1.0, 100.0),
        "People whose ranking every prompt waits for; their scores are averaged.",
    ) as usize;
    let weight = s.number("weight", 1.0, Range::from(f64::MIN), "Weight of their score beside other rewards.");
    let listen = listen?;
    match listen.parse() {
        Ok(listen) => Some(PeopleConfig { listen, token_env, labels, weight }),
        Err(_) => {
            s.problem("listen", format!("= \"{listen}\" must be an address with a port, such as \"127.0.0.1:8765\""));
            None
        }
    }
}

pub(super) fn judge(mut s: Section<'_>, base: &Path) -> Option<JudgeConfig> {
    let local = s.text(
        "model",
        "a path, \"embedded\" or \"stage:NAME\"",
        "A local model as judge: the probabilities of its verdict tokens count. Beside the architectures that can be trained, Hugging Face directories of Phi 3, OLMo 1 and 2, StarCoder 2, Gemma 1, Helium and SmolLM 3, and GGUF files of Qwen 2 and 3, Gemma 2 and 3, Phi 2 and 3, GLM 4 and LFM 2, can judge, on the CPU.",
    );
    let local = local.map(|text| schema::source_of(&mut s, "model", &text, base));
    let name = s.text("api_model", "a model's name", "What `url` calls the judge.");
    let endpoint =
        endpoint(&mut s, "the OpenAI-compatible `.../chat/completions` of a judge, or what stands before that");
    let tokens_max = s.integer("tokens_max", 512, Range::from(1.0), "Tokens of a reply at most.") as usize;
    let structured = s.choice(
        "reply",
        &[("words", false), ("object", true)],
        "How a judge behind `url` answers: in words that end with a verdict, or with an object whose form the server enforces (structured outputs, where it has them).",
    );
    let template = s.text(
        "template",
        "\"helpful\", \"harmless\", \"summary\", \"brief\", \"mt_bench\"",
        "What is asked for (default `helpful`).",
    );
    let template = template.unwrap_or_else(|| "helpful".into());
    if !crate::judge::NAMES.contains(&template.as_str()) {
        s.problem("template", format!("= \"{template}\" must be one of {}", crate::judge::NAMES.join(", ")));
    }
    let template_file = s.existing("template_file", base, "A Jinja template of your own, with `question`, `first` and `second` (`answer` for grades, the list `answers` for rankings), which are quoted already.");
    let mode = s.choice(
        "mode",
        &[
            ("average", Mode::Pairwise(Orders::Average)),
            ("agree", Mode::Pairwise(Orders::Agree)),
            ("first_order", Mode::Pairwise(Orders::First)),
            ("rank", Mode::Ranking),
            ("grade", Mode::Grade),
        ],
        "Pairs in both orders, averaged (`average`) or a tie unless both agree (`agree`), or in one order; all answers at once, in order and in reverse (`rank`); or each answer by itself, from 1 to 10.",
    );
    let weight = s.number("weight", 1.0, Range::from(f64::MIN), "Weight of its score beside other rewards.");
    let mut price = |key, what| s.number(key, 0.0, Range::from(0.0), what);
    let prices = Prices {
        input: price("price_input", "Price of a million tokens of questions, in any currency."),
        output: price("price_output", "Price of a million tokens of replies."),
    };
    let budget = Budget {
        calls: s.integer(
            "calls_max",
            0,
            Range::from(0.0),
            "Questions of the whole job; then it stops with a checkpoint. 0 for any number.",
        ),
        tokens: s.integer(
            "spend_tokens_max",
            0,
            Range::from(0.0),
            "The same for tokens, those of questions and replies together, as the server counts them.",
        ),
        money: s.number("spend_max", 0.0, Range::from(0.0), "The same for money, by `price_input` and `price_output`."),
    };
    if budget.money > 0.0 && prices == Prices::default() {
        s.problem(
            "spend_max",
            "needs `judge.price_input` and `judge.price_output`; without them nothing costs anything",
        );
    }
    let source = match (local, endpoint, name) {
        (None, None, _) => return None,
        (Some(_), Some(_), _) => {
            s.problem("url", "and `judge.model` name two judges; one judges");
            return None;
        }
        (Some(model), None, _) => JudgeSource::Local(model),
        (None, Some(endpoint), model) => {
            let model = model.unwrap_or_else(|| "default".into());
            JudgeSource::Api { settings: ApiSettings { model, tokens_max, prices, structured }, endpoint }
        }
    };
    Some(JudgeConfig { source, template, template_file, mode, weight, budget })
}

pub(super) fn scorer(mut s: Section<'_>) -> Option<ScorerConfig> {
    let endpoint = endpoint(
        &mut s,
        "a server that is sent `{\"samples\": [{\"prompt\", \"completion\", \"answer\"}]}` and answers `{\"scores\": [..]}`",
    );
    let batch = s.integer("batch", 16, Range::from(1.0), "Samples of one request.") as usize;
    let weight = s.number("weight", 1.0, Range::from(f64::MIN), "Weight of its score beside other rewards.");
    endpoint.map(|endpoint| ScorerConfig { endpoint, batch, weight })
}

fn endpoint(s: &mut Section<'_>, what: &'static str) -> Option<Endpoint> {
    let url = s.text("url", "a URL", what);
    let token_env = s.text(
        "token_env",
        "a variable's name",
        "Environment variable with a bearer token; the token is never stored or logged.",
    );
    let timeout = Duration::from_secs(s.integer("timeout_seconds", 60, Range::from(1.0), "Time of one request."));
    let retries = s.integer(
        "retries",
        5,
        Range::within(0.0, 1000.0),
        "Times a request that failed is tried again, after pauses that double from a quarter of a second.",
    ) as u32;
    let wait = s.choice(
        "unreachable",
        &[("fail", false), ("wait", true)],
        "After the last try: end the job, or go on trying.",
    );
    let concurrency = s.integer("concurrency", 4, Range::within(1.0, 256.0), "Requests under way at a time.") as usize;
    let url = url?;
    if !(url.starts_with("http://") || url.starts_with("https://")) {
        s.problem("url", format!("= \"{url}\" must begin with http:// or https://"));
    }
    Some(Endpoint { url, token_env, timeout, retries, wait, concurrency })
}
