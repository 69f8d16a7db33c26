//! An objective outside the crate's own, written against the public interface, trains the policy.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_learn::AdamWConfig;
use rehearsal_lm::random::Stream;
use rehearsal_lm::{Architecture, Batch, Checkpoint, Precision, Text};
use serde_json::json;
use tokio::sync::mpsc;

use candle_core::{Device, Tensor};

use crate::{
    Demonstrations, Devices, Director, Error, MaskedSequence, Objective, PairTokens, Pairs, Pass, Placement,
    PolicyHandle, Result, Tokens, TrainedConfig, UpdateBatch,
};

/// A Llama of one layer with random weights and a vocabulary of four tokens.
pub fn tiny_model() -> Checkpoint {
    let config = json!({
        "model_type": "llama", "vocab_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 2, "eos_token_id": 3,
        "torch_dtype": "float32",
    });
    let architecture = Architecture::from_json(&config).unwrap();
    let drawn = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let (stream, n) = (Stream::new(11, i as u64), shape.iter().product::<usize>() as u64);
        let center = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let data: Vec<f32> = (0..n).map(|j| center + 0.3 * stream.normal(j) as f32).collect();
        (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap())
    };
    let parameters = architecture.parameters().into_iter().enumerate().map(drawn).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<s>": 2, "</s>": 3}, "unk_token": "a"},
    });
    let text = Text::from_json(tokenizer.to_string().as_bytes(), None, None).unwrap();
    Checkpoint { architecture, config, parameters, text }
}

async fn policy() -> (Director, PolicyHandle) {
    policy_of(1, 1).await
}

/// A policy of some members, whose steps are cut into `leaves` leaves.
async fn policy_of(members: usize, leaves: usize) -> (Director, PolicyHandle) {
    let deadline = Duration::from_secs(60);
    let (events, _) = mpsc::unbounded_channel();
    let director = Director::start(0, deadline, events).await.unwrap();
    let config = TrainedConfig {
        placements: vec![Placement::Cpu; members],
        leaves,
        shard: false,
        optimizer: AdamWConfig::default(),
        max_grad_norm: None,
        micro_batch_tokens: 8,
        precision: Precision::F32,
        gradient_checkpointing: false,
        ema_decay: None,
        lora: None,
    };
    let policy = director.policy(Arc::new(tiny_model()), config, Devices::new(1).unwrap()).await.unwrap();
    (director, policy)
}

fn wanted() -> Vec<Tokens> {
    let of = |prompt: &[u32], completion: &[u32]| Tokens {
        prompt: Arc::new(prompt.to_vec()),
        completion: Arc::new(completion.to_vec()),
    };
    vec![of(&[2, 0], &[1, 3]), of(&[2, 1, 1], &[0, 0, 3]), of(&[2, 0, 1], &[0, 3])]
}

/// Minimizes the mean negative log-probability of completions, token by token.
#[derive(Debug)]
struct Likelihood {
    wanted: Vec<Tokens>,
    /// Returns a loss that does not depend on the model's output.
    constant: bool,
}

impl Objective for Likelihood {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        assert!(!pass.is_cancelled() && pass.decoder().architecture().layers == 1);
        let total: usize = self.wanted.iter().map(|t| t.completion.len()).sum();
        for micro_batch in pass.micro_batches(&self.wanted, |t| t.prompt.len() + t.completion.len()) {
            let batch = Batch::new(micro_batch?.iter().map(Tokens::sequence));
            pass.micro_step(
                batch.tokens(),
                |model, temperature| model.forward(&batch, temperature),
                |pass, logprobs| {
                    let sum = (if self.constant { logprobs.detach() } else { logprobs.clone() }).sum_all()?;
                    pass.add("logprob", f64::from(sum.to_scalar::<f32>()?), batch.scored());
                    Ok((sum.neg()? / total as f64)?)
                },
            )?;
        }
        Ok(())
    }
}

#[tokio::test]
async fn an_objective_of_the_user_is_minimized() {
    let (director, policy) = policy().await;
    let step = |constant: bool| {
        let objective = Arc::new(Likelihood { wanted: wanted(), constant });
        UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 }
    };
    let logprob = async || {
        let all = policy.logprobs(wanted(), 1.0).await.unwrap().concat();
        all.iter().map(|&x| f64::from(x)).sum::<f64>() / all.len() as f64
    };
    let before = logprob().await;
    let report = policy.step(step(false), Default::default()).await.unwrap();
    assert!((report.loss + before).abs() < 1e-6 && (report.stats["logprob"] - before).abs() < 1e-6, "{report:?}");
    // A sequence's last token predicts nothing and is not run.
    assert_eq!((report.version, report.tokens), (1, 12));
    let after = logprob().await;
    assert!(after > before + 1e-3, "{before} {after}");

    let cancelled = tokio_util::sync::CancellationToken::new();
    let no_gradient = policy.step(step(true), cancelled.clone()).await.unwrap_err();
    assert!(matches!(no_gradient, Error::Model(rehearsal_lm::Error::NoGradient(_))), "{no_gradient}");
    assert_eq!(logprob().await, after, "a step that fails changes no weight");
    director.stop().await;
}

#[tokio::test]
async fn a_cancelled_step_changes_no_weight() {
    let (director, policy) = policy().await;
    /// Cancels the step, as its caller would while the step runs.
    #[derive(Debug)]
    struct Cancels(tokio_util::sync::CancellationToken);
    impl Objective for Cancels {
        fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
            self.0.cancel();
            assert!(pass.is_cancelled());
            match pass.micro_batches(&[1], |n| *n).next() {
                Some(Err(error)) => Err(error),
                other => panic!("a micro-batch of a cancelled step: {other:?}"),
            }
        }
    }
    let cancel = tokio_util::sync::CancellationToken::new();
    let objective = Arc::new(Cancels(cancel.clone()));
    let batch = UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 };
    assert!(matches!(policy.step(batch, cancel).await, Err(Error::Cancelled)));
    assert_eq!(policy.snapshot().await.unwrap().version, 0);
    director.stop().await;
}

#[tokio::test]
async fn a_batch_with_missing_values_is_an_error() {
    let (director, policy) = policy().await;
    let learn = |objective: Arc<dyn Objective>| {
        policy.step(UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 }, Default::default())
    };
    let [chosen, _, rejected] = <[Tokens; 3]>::try_from(wanted()).unwrap();
    let pair = PairTokens {
        chosen: chosen.clone(),
        rejected,
        sampler_chosen: Vec::new(),
        sampler_rejected: Vec::new(),
        ref_chosen: vec![-1.0; 2],
        ref_rejected: Vec::new(),
        score_gap: None,
    };
    let error = learn(Arc::new(Pairs { pairs: vec![pair], loss: Default::default(), cut: Default::default() }))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("pair 0") && error.contains("0 `ref_rejected` for 2"), "{error}");
    let sequence = MaskedSequence { tokens: chosen.prompt, loss_mask: Arc::new(vec![true]) };
    let demonstrations = Demonstrations { sequences: vec![sequence], reduction: Default::default() };
    let error = learn(Arc::new(demonstrations)).await.unwrap_err().to_string();
    assert!(error.contains("sequence 0") && error.contains("2 tokens"), "{error}");
    assert_eq!(policy.snapshot().await.unwrap().version, 0);
    director.stop().await;
}

#[tokio::test]
async fn an_objective_of_the_user_is_cut_into_leaves() {
    let learn = async |members, leaves| {
        let (director, policy) = policy_of(members, leaves).await;
        let objective = Arc::new(Likelihood { wanted: wanted(), constant: false });
        let batch = UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 };
        let report = policy.step(batch, Default::default()).await.unwrap();
        let logprobs = policy.logprobs(wanted(), 1.0).await.unwrap();
        director.stop().await;
        (report.loss, report.grad_norm, report.stats, report.tokens, logprobs)
    };
    let (one, two) = (learn(1, 2).await, learn(2, 2).await);
    assert_eq!(one, two);
    let whole = learn(1, 1).await;
    assert!((one.0 - whole.0).abs() < 1e-6 && (one.1 - whole.1).abs() < 1e-5, "{one:?} {whole:?}");
    assert_eq!(one.3, whole.3);
}

#[tokio::test]
async fn an_objective_that_is_not_cut_is_refused_where_there_are_leaves() {
    /// Takes all data, whatever the leaf.
    #[derive(Debug)]
    struct Whole(Vec<Tokens>);
    impl Objective for Whole {
        fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
            let batch = Batch::new(self.0.iter().map(Tokens::sequence));
            pass.micro_step(batch.tokens(), |model, t| model.forward(&batch, t), |_, logprobs| Ok(logprobs.sum_all()?))
        }
    }
    let step = async |leaves| {
        let (director, policy) = policy_of(1, leaves).await;
        let batch = UpdateBatch { objective: Arc::new(Whole(wanted())), learning_rate: 1e-2, temperature: 1.0 };
        let result = policy.step(batch, Default::default()).await.map(|_| ());
        director.stop().await;
        result
    };
    step(1).await.unwrap();
    let error = step(2).await.unwrap_err().to_string();
    assert!(error.contains("micro_batches") && error.contains("2 leaves"), "{error}");
}
