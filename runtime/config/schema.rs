//! Every section and key, with its default, range and description: the one place that knows them.

use std::path::Path;
use std::time::Duration;

use rehearsal_actors::Placement;
use rehearsal_learn::{AdamRule, AdamWConfig, MomentType, ScheduleKind, TieRule};
use rehearsal_lm::Precision;
use rehearsal_lm::generate::Sampling;

use super::reader::{Range, Reader, Section};
use super::*;

/// Reads all sections; problems are left in the reader, with defaults in their place.
pub fn read(r: &mut Reader, base: &Path) -> Config {
    let job = job(r.section("job"), base);
    let algorithm = job.algorithm;
    let config = Config {
        job,
        model: model(r.section("model"), base),
        data: methods::data(r.section("data"), base),
        sft: methods::sft(r.section("sft")),
        reward_model: methods::reward_model(r.section("reward_model"), base),
        ppo: methods::ppo(r.section("ppo"), base),
        critic: methods::critic(r.section("critic"), base),
        update: methods::update(r.section("update")),
        rso: methods::rso(r.section("rso")),
        lora: methods::lora(r.section("lora"), base),
        prompts: prompts(r.section("prompts"), base),
        rollout: rollout(r.section("rollout"), algorithm),
        reward: reward(r.section("reward"), base),
        judge: judges::judge(r.section("judge"), base),
        scorer: judges::scorer(r.section("scorer")),
        encoder: judges::encoder(r.section("encoder"), base),
        people: judges::people(r.section("people")),
        loss: loss(r.section("loss")),
        optimizer: optimizer(r.section("optimizer")),
        evaluation: evaluation(r.section("evaluation")),
        checkpoint: checkpoint(r.section("checkpoint")),
        placement: placement(r.section("placement")),
        limits: limits(r.section("limits")),
        metrics: metrics(r.section("metrics")),
    };
    let (completions, max) = (config.completions_per_step(), config.limits.rollouts_max);
    if completions > max {
        let message = format!("= {max} is less than the {completions} completions of a step");
        r.section("limits").problem("rollouts_max", message);
    }
    agree(r, &config);
    config
}

/// What sections must agree on.
fn agree(r: &mut Reader, config: &Config) {
    let algorithm = config.job.algorithm;
    if algorithm.is_offline() && config.data.train.is_empty() {
        r.section("data").problem("train", format!("is missing; `{}` learns from rows", algorithm.name()));
    }
    let k = config.rollout.completions_per_prompt;
    if algorithm == Algorithm::Ppo && config.ppo.advantages != methods::Advantages::Gae && k < 2 {
        let message = format!("= {k} leaves nothing to compare with; advantages without a critic need 2 or more");
        r.section("rollout").problem("completions_per_prompt", message);
    }
    if algorithm == Algorithm::Rso && config.rso.keep > k {
        let keep = config.rso.keep;
        r.section("rso").problem("keep", format!("= {keep} exceeds `rollout.completions_per_prompt` = {k}"));
    }
    let minibatches = config.update.minibatches;
    let completions = config.rollout.prompts_per_step * k;
    if algorithm == Algorithm::Ppo && minibatches > completions {
        let message = format!("= {minibatches} exceeds the {completions} completions of a step");
        r.section("update").problem("minibatches", message);
    }
}

fn job(mut s: Section<'_>, base: &Path) -> JobConfig {
    let algorithm = s.choice("algorithm", &Algorithm::NAMES, "What the job does; docs/methods.md describes each.");
    let directory =
        s.needed("directory", "a path, relative to this file", "Where checkpoints, ledger and history are kept.");
    JobConfig {
        algorithm,
        directory: resolve(base, &directory),
        steps: s.integer("steps", 100, Range::from(1.0), "Optimiser steps of the whole job. May grow on resume."),
        seed: s.integer(
            "seed",
            0,
            Range::within(0.0, i64::MAX as f64),
            "Seed of everything random: order of prompts, sampled tokens.",
        ),
    }
}

fn source(s: &mut Section<'_>, key: &'static str, base: &Path, help: &'static str) -> Option<ModelSource> {
    let text =
        s.text(key, "\"embedded\", a path to a Hugging Face directory or .gguf file, or \"stage:NAME\"", help)?;
    Some(source_of(s, key, &text, base))
}

/// A model by the name that was typed.
pub(super) fn source_of(s: &mut Section<'_>, key: &str, text: &str, base: &Path) -> ModelSource {
    if text == "embedded" {
        return ModelSource::Embedded;
    }
    if let Some(name) = text.strip_prefix("stage:") {
        let Some(path) = s.earlier().model(name) else {
            s.problem(key, format!("names the stage `{name}`, which does not come before this one"));
            return ModelSource::Embedded;
        };
        return ModelSource::Path(path.clone());
    }
    let path = resolve(base, text);
    if !path.exists() && !s.earlier().has(&path) {
        s.problem(key, format!("names {}, which does not exist", path.display()));
    }
    ModelSource::Path(path)
}

fn model(mut s: Section<'_>, base: &Path) -> ModelConfig {
    let policy = source(
        &mut s,
        "policy",
        base,
        "The model to train. Without it, that of the last stage, or the tiny one inside this program.",
    );
    let before = s.earlier().policy.clone().map(ModelSource::Path);
    let policy = policy.or(before).unwrap_or(ModelSource::Embedded);
    let reference = source(
        &mut s,
        "reference",
        base,
        "The model not to stray from. Without it, the policy as it was at the start.",
    );
    let dtype = s.choice(
        "dtype",
        &[("f32", Precision::F32), ("bf16", Precision::Bf16)],
        "What matrix products compute in. With `bf16` their factors are rounded to bfloat16 and their sums are f32; the trained weights, gradients and sums stay f32, the reference is held in bf16.",
    );
    ModelConfig { reference: reference.unwrap_or_else(|| policy.clone()), policy, dtype }
}

fn prompts(mut s: Section<'_>, base: &Path) -> PromptsConfig {
    let on_bad = [("fail", OnBad::Fail), ("skip", OnBad::Skip)];
    PromptsConfig {
        train: s.existing("train", base, "JSON Lines with a column `prompt` (a text or a list of messages). Without it, the embedded prompts."),
        held_out: s.existing("held_out", base, "Prompts for evaluation, in the same form. Without it, the last prompts of `train` are kept apart for it."),
        answer_column: s.text("answer_column", "a column", "Column with a reference answer, for rules that compare (default `answer`).").unwrap_or_else(|| "answer".into()),
        system: s.text("system", "a text", "System message put before prompts that have none."),
        chat: s.flag("chat", true, "Put prompts into the model's chat template, if it has one."),
        on_bad_line: s.choice("on_bad_line", &on_bad, "A line that is no JSON object, or whose prompt is missing or empty: stop with its number, or skip and count it."),
        on_long: s.choice("on_long", &[("skip", OnBad::Skip), ("fail", OnBad::Fail)], "A prompt over `tokens_max`: skip and count it, or stop with its number."),
        tokens_max: s.integer("tokens_max", 0, Range::from(0.0), "Tokens of a prompt at most; 0 takes what the model's context leaves.") as usize,
    }
}

fn rollout(mut s: Section<'_>, algorithm: Algorithm) -> RolloutConfig {
    let (default, least) = if algorithm == Algorithm::Ppo { (1, 1.0) } else { (2, 2.0) };
    let max_new_tokens = s.integer("max_new_tokens", 64, Range::from(1.0), "Tokens of a completion at most.") as usize;
    let min_new_tokens =
        s.integer("min_new_tokens", 0, Range::from(0.0), "No end-of-sequence token before this many.") as usize;
    if min_new_tokens > max_new_tokens {
        s.problem("min_new_tokens", format!("= {min_new_tokens} exceeds `rollout.max_new_tokens` = {max_new_tokens}"));
    }
    RolloutConfig {
        prompts_per_step: s.integer(
            "prompts_per_step",
            8,
            Range::within(1.0, 65_536.0),
            "Prompts of an optimiser step.",
        ) as usize,
        completions_per_prompt: s.integer(
            "completions_per_prompt",
            default,
            Range::within(least, 256.0),
            "Completions of a prompt; the best meets the worst. For `ppo`, 1 or more, and by default 1.",
        ) as usize,
        max_new_tokens,
        min_new_tokens,
        sampling: Sampling {
            temperature: s.number(
                "temperature",
                0.9,
                Range::above(0.0),
                "Divides the logits when sampling, and in every log-probability.",
            ),
            top_k: s.integer("top_k", 0, Range::from(0.0), "Sample among the k likeliest tokens; 0 among all.")
                as usize,
            top_p: s.number(
                "top_p",
                1.0,
                Range::above_to(0.0, 1.0),
                "Sample among the likeliest tokens that reach this probability.",
            ),
            min_p: s.number(
                "min_p",
                0.0,
                Range::within(0.0, 1.0),
                "Sample among tokens at least this many times as likely as the likeliest.",
            ),
        },
        stop: s.texts("stop", "a list of texts", "Texts that end a completion."),
        batch: s.integer(
            "batch",
            64,
            Range::within(1.0, 4096.0),
            "Sequences generated side by side at most. Changes memory and speed, no result.",
        ) as usize,
    }
}

fn reward(mut s: Section<'_>, base: &Path) -> RewardConfig {
    let models = methods::reward_models(&mut s, base);
    let rules = s.texts("rules", "a list of rule names", "Rules whose weighted sum is the reward: `length_window`, `ends_properly`, `matches`, `exact_answer`, `distinct_words`. Empty when the program brings a reward of its own.");
    let weights = s.numbers("weights", "one number for each rule", "Weights of the rules; 1 each when left out.");
    let words_min = s.integer("words_min", 1, Range::from(0.0), "`length_window`: words at least.");
    let words_max = s.integer("words_max", 50, Range::from(1.0), "`length_window`: words at most.");
    let pattern = s.text("pattern", "a regular expression", "`matches`: what a completion must contain.");
    for name in &rules {
        if !crate::rules::NAMES.contains(&name.as_str()) {
            s.problem("rules", format!("names `{name}`; there are {}", crate::rules::NAMES.join(", ")));
        }
    }
    if !weights.is_empty() && weights.len() != rules.len() {
        s.problem("weights", format!("has {} numbers for {} rules", weights.len(), rules.len()));
    }
    if words_min > words_max {
        s.problem("words_min", format!("= {words_min} exceeds `reward.words_max` = {words_max}"));
    }
    match &pattern {
        Some(text) => {
            if let Err(e) = regex::Regex::new(text) {
                s.problem("pattern", format!("is no regular expression: {}", e.to_string().replace('\n', " ")));
            }
        }
        None if rules.iter().any(|r| r == "matches") => {
            s.problem("rules", "has `matches`, which needs `reward.pattern`")
        }
        None => {}
    }
    let mut models = models;
    if let (Some(model), true, false) = (s.earlier().reward_model.clone(), rules.is_empty(), s.has("models")) {
        models.models.push(ModelSource::Path(model)); // a chain's reward model is what its policy is trained on
    }
    let weights = if weights.is_empty() { vec![1.0; rules.len()] } else { weights };
    RewardConfig { rules, weights, words_min, words_max, pattern, models }
}

fn loss(mut s: Section<'_>) -> LossConfig {
    LossConfig {
        preference: methods::preference(&mut s),
        ties: s.choice(
            "ties",
            &[("skip", TieRule::Skip), ("first", TieRule::First)],
            "Equal scores: no pair, or the first completion wins (TRL).",
        ),
        missing_eos_penalty: s.number(
            "missing_eos_penalty",
            0.0,
            Range::from(0.0),
            "Taken off the score of a completion that was cut off by its length.",
        ),
    }
}

fn optimizer(mut s: Section<'_>) -> OptimizerConfig {
    let floor = s.number(
        "min_lr_rate",
        0.0,
        Range::within(0.0, 1.0),
        "`cosine`: the last learning rate as a share of the peak.",
    );
    let schedules = [
        ("constant", ScheduleKind::Constant),
        ("constant_from_tenth", ScheduleKind::ConstantFromTenth),
        ("linear", ScheduleKind::Linear),
        ("cosine", ScheduleKind::Cosine { floor }),
    ];
    let norm = s.number(
        "max_grad_norm",
        1.0,
        Range::from(0.0),
        "Gradients are scaled down to this global norm; 0 leaves them.",
    );
    let ema_decay = s.number(
        "ema_decay",
        0.0,
        Range::within(0.0, 0.999_999),
        "Decay of an average of the weights, exported in their place (InstructGPT: 0.992); 0 keeps none.",
    );
    OptimizerConfig {
        adamw: AdamWConfig {
            beta1: s.number("beta1", 0.9, Range::within(0.0, 0.999_999), "AdamW: decay of the first moment."),
            beta2: s.number("beta2", 0.999, Range::within(0.0, 0.999_999), "AdamW: decay of the second moment."),
            eps: s.number("eps", 1e-8, Range::above(0.0), "AdamW: added to the root of the second moment."),
            weight_decay: s.number("weight_decay", 0.0, Range::from(0.0), "AdamW: decoupled decay of matrices."),
            moments: s.choice(
                "moments",
                &[("f32", MomentType::Full), ("bf16", MomentType::Bf16), ("int8", MomentType::Int8)],
                "AdamW: what both moments are stored as. `bf16` takes half the memory, `int8` (with a scale for each block of 256) a quarter; both are rounded at random.",
            ),
            rule: s.choice(
                "adam_rule",
                &[("corrected", AdamRule::Corrected), ("epsilon_hat", AdamRule::EpsilonHat)],
                "Where `eps` is added: to the corrected moment (PyTorch), or as TensorFlow 1 did it, with smaller first steps.",
            ),
        },
        learning_rate: s.number("learning_rate", 5e-7, Range::above(0.0), "Peak learning rate."),
        schedule: s.choice("schedule", &schedules, "Shape of the learning rate after its warm-up."),
        warmup_steps: s.integer("warmup_steps", 0, Range::from(0.0), "Steps from 0 to the peak."),
        max_grad_norm: (norm > 0.0).then_some(norm),
        micro_batch_tokens: s.integer(
            "micro_batch_tokens",
            4096,
            Range::from(1.0),
            "Tokens that go through forward and backward at a time: memory against speed.",
        ) as usize,
        gradient_checkpointing: s.flag(
            "gradient_checkpointing",
            false,
            "Keep only the input of each block and run the block again on the way back: a third more work for much less memory. Changes no result.",
        ),
        ema_decay: (ema_decay > 0.0).then_some(ema_decay),
    }
}

fn evaluation(mut s: Section<'_>) -> EvaluationConfig {
    EvaluationConfig {
        every_steps: s.integer(
            "every_steps",
            0,
            Range::from(0.0),
            "Answer the held-out prompts (or read the held-out rows) at the start, every so many steps, and at the end; 0 never.",
        ),
        prompts: s.integer("prompts", 32, Range::from(1.0), "Held-out prompts at most.") as usize,
        samples: s.integer("samples", 3, Range::within(0.0, 100.0), "Answers kept to look at.") as usize,
    }
}

fn checkpoint(mut s: Section<'_>) -> CheckpointConfig {
    CheckpointConfig {
        every_steps: s.integer(
            "every_steps",
            50,
            Range::from(1.0),
            "Steps between checkpoints; one is also made at the end and on a polite stop.",
        ),
        keep: s.integer("keep", 2, Range::within(1.0, 1000.0), "Checkpoints kept.") as usize,
    }
}

fn place(s: &mut Section<'_>, key: &'static str, help: &'static str) -> Option<Placement> {
    let text = s.text(key, "\"cpu\" or \"cuda:N\"", help)?;
    match text.parse() {
        Ok(placement) => Some(placement),
        Err(e) => {
            s.problem(key, format!("= \"{text}\": {e}"));
            None
        }
    }
}

fn placement(mut s: Section<'_>) -> PlacementConfig {
    let policy = place(&mut s, "policy", "Device of the policy (default `cpu`).").unwrap_or_default();
    let reference =
        place(&mut s, "reference", "Device of the reference (default: that of the policy).").unwrap_or(policy);
    let reward = place(&mut s, "reward", "Device of trained reward models (default: that of the policy).");
    let critic = place(&mut s, "critic", "Device of the critic (default: that of the policy).");
    PlacementConfig {
        policy,
        reference,
        reward: reward.unwrap_or(policy),
        critic: critic.unwrap_or(policy),
        threads: s.integer(
            "threads",
            0,
            Range::within(0.0, 1024.0),
            "CPU threads; 0 takes one for each core. Changes the speed, no result.",
        ) as usize,
    }
}

fn limits(mut s: Section<'_>) -> LimitsConfig {
    LimitsConfig {
        request: Duration::from_secs(s.integer(
            "request_seconds",
            3600,
            Range::from(1.0),
            "A role answers within this, or the request fails.",
        )),
        restarts_max: s.integer(
            "restarts_max",
            3,
            Range::within(0.0, 1000.0),
            "Times a role that died is started again.",
        ) as u32,
        rollouts_max: s.integer("rollouts_max", 65_536, Range::from(1.0), "Rollouts the buffer holds at most.")
            as usize,
        staleness_max: s.integer(
            "staleness_max",
            0,
            Range::from(0.0),
            "Updates a rollout may be old when it is learned from.",
        ),
        kept_tokens: s.integer(
            "kept_tokens",
            4096,
            Range::from(0.0),
            "What was computed of a step's tokens while they were generated is kept for the update on them, which then begins with the way back. A step of more tokens than this, or than `optimizer.micro_batch_tokens`, computes them twice, as does everything on a GPU. Memory against speed: changes no result.",
        ) as usize,
    }
}

fn metrics(mut s: Section<'_>) -> MetricsConfig {
    let listen = s.text(
        "listen",
        "an address with a port",
        "Serve Prometheus metrics there, such as `127.0.0.1:9464`. Without it nothing listens.",
    );
    let parsed = listen.as_ref().and_then(|text| text.parse().ok());
    if let (Some(text), None) = (&listen, &parsed) {
        s.problem("listen", format!("= \"{text}\" must be an address with a port, such as 127.0.0.1:9464"));
    }
    MetricsConfig { listen: parsed }
}
