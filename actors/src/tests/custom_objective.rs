//! An objective outside the crate's own, written against the public interface, trains the policy.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_learn::AdamWConfig;
use rehearsal_lm::generate::{Options, Request, Sampling};
use rehearsal_lm::random::Stream;
use rehearsal_lm::{Architecture, Batch, Checkpoint, Precision, Text};
use serde_json::json;
use tokio::sync::mpsc;

use candle_core::{Device, Tensor};

use crate::{
    Demonstrations, Devices, Director, Error, MaskedSequence, Objective, PairTokens, Pairs, Pass, Placement,
    PolicyHandle, Ranks, Result, Tokens, TrainedConfig, UpdateBatch, serve, wires,
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
    let devices = Devices::new(1).unwrap();
    let policy = start(&director, members, leaves, false, devices).await;
    (director, policy)
}

async fn start(director: &Director, members: usize, leaves: usize, shard: bool, devices: Devices) -> PolicyHandle {
    let config = TrainedConfig {
        placements: vec![Placement::Cpu; members],
        leaves,
        shard,
        optimizer: AdamWConfig::default(),
        max_grad_norm: None,
        micro_batch_tokens: 8,
        precision: Precision::F32,
        gradient_checkpointing: false,
        ema_decay: None,
        lora: None,
    };
    director.policy(Arc::new(tiny_model()), config, devices).await.unwrap()
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

/// What a policy of some ranks ends with after a few steps and a restored snapshot.
async fn of_ranks(ranks: usize, shard: bool) -> (Vec<f64>, Vec<Vec<f32>>, Vec<Vec<u32>>) {
    let (events, _) = mpsc::unbounded_channel();
    let director = Director::start(0, Duration::from_secs(60), events).await.unwrap();
    let mut wires = wires(ranks).into_iter();
    let ranks = Ranks::new(wires.next().unwrap());
    let others: Vec<_> = wires.map(|wire| std::thread::spawn(move || serve(&*wire, 1))).collect();
    let devices = Devices::new(1).unwrap().with_ranks(ranks.clone());
    let policy = start(&director, 1, 4, shard, devices).await;
    let (mut numbers, mut kept) = (Vec::new(), None);
    for step in 0..4 {
        let sequences = wanted().into_iter().map(|t| MaskedSequence {
            tokens: Arc::new([t.prompt.as_slice(), t.completion.as_slice()].concat()),
            loss_mask: Arc::new(vec![true; t.prompt.len() + t.completion.len()]),
        });
        let objective = Arc::new(Demonstrations { sequences: sequences.collect(), reduction: Default::default() });
        let batch = UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 };
        let report = policy.step(batch, Default::default()).await.unwrap();
        numbers.extend([report.loss, report.grad_norm, report.stats["nll"], report.tokens as f64]);
        match step {
            1 => kept = Some(policy.snapshot().await.unwrap().copied()),
            2 => policy.restore(kept.take().unwrap()).await.unwrap(),
            _ => {}
        }
    }
    let logprobs = policy.logprobs(wanted(), 1.0).await.unwrap();
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let requests = wanted().iter().zip(0..).map(|(t, id)| Request { id, prompt: t.prompt.clone() }).collect();
    let options = Options {
        sampling: Sampling::default(),
        max_new_tokens: 5,
        min_new_tokens: 0,
        eos: vec![3],
        stop: Vec::new(),
        seed: 1,
        batch: 2,
    };
    policy.generate(requests, options, 0, sender, Default::default()).await.unwrap();
    let mut completions = Vec::new();
    while let Ok(completion) = receiver.try_recv() {
        completions.push(completion);
    }
    completions.sort_by_key(|c| c.id);

    // An objective of the program's own stays in its process.
    if ranks.size() > 1 {
        let objective = Arc::new(Likelihood { wanted: wanted(), constant: false });
        let batch = UpdateBatch { objective, learning_rate: 1e-2, temperature: 1.0 };
        let error = policy.step(batch, Default::default()).await.unwrap_err().to_string();
        assert!(error.contains("portable"), "{error}");
    }
    director.stop().await;
    ranks.stop();
    others.into_iter().for_each(|other| other.join().unwrap().unwrap());
    (numbers, logprobs, completions.into_iter().map(|c| c.tokens).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn members_in_other_processes_change_no_bit() {
    let one = of_ranks(1, false).await;
    assert_eq!(one.2.len(), 3);
    for ranks in [2, 4] {
        for shard in [false, true] {
            assert_eq!(of_ranks(ranks, shard).await, one, "{ranks} ranks, shard: {shard}");
        }
    }
}
