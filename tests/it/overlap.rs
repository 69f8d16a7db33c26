//! What is asked while completions are still being generated, and that it changes nothing but the time.

use std::sync::{Arc, Mutex};

use rehearsal::judge::{Devices, Placement};
use rehearsal::{Judged, Reward, RewardError, Sample};
use rehearsal_actors::{RewardModel, RewardModels, Tokens};
use rehearsal_learn::reward::Ensemble;
use rehearsal_lm::generate::Finish;
use rehearsal_lm::{Batch, Checkpoint, Message, Precision, Sequence};

use crate::support::edit::set;
use crate::support::{Remains, config, rewarded_by, rollout, run_with, toml};

/// Writes down how much it is asked at a time, and says where it computes.
struct Counting {
    asked: Arc<Mutex<Vec<usize>>>,
    occupies: Vec<Placement>,
}

impl Reward for Counting {
    fn name(&self) -> &str {
        "counting"
    }

    fn placements(&self) -> Vec<Placement> {
        self.occupies.clone()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        self.asked.lock().unwrap().push(samples.len());
        Ok(samples.iter().map(|s| Judged::from(s.completion.len() as f64)).collect())
    }
}

#[test]
fn a_reward_elsewhere_is_asked_while_the_policy_generates_and_the_result_is_the_same() {
    let one = |occupies: Vec<Placement>| {
        let folder = tempfile::tempdir().unwrap();
        let asked: Arc<Mutex<Vec<usize>>> = Arc::default();
        // One completion after the other, so that the first prompt's are there long before the last.
        let mut config = config(folder.path(), 3, "");
        rollout(&mut config).batch = 1;
        rollout(&mut config).prompts_per_step = 8;
        run_with(config, Counting { asked: asked.clone(), occupies }).unwrap();
        let asked = asked.lock().unwrap().clone();
        (asked, Remains::of(folder.path()))
    };
    let ((apart, early), (together, late)) = (one(vec![]), one(vec![Placement::Cpu]));
    assert_eq!(together, [16; 3], "a reward on the policy's device waits for its turn");
    assert!(apart.len() > 3 && apart.iter().sum::<usize>() == 48, "nothing was asked early: {apart:?}");
    assert!(apart.iter().all(|n| n.is_multiple_of(2)), "a prompt's answers are compared together: {apart:?}");
    assert!(early.tensors == late.tensors);
}

/// The embedded model with a score head, in a directory, under another tokenizer: one with a token more.
fn foreign_reward_model(directory: &std::path::Path) -> Checkpoint {
    let model = rehearsal::embedded::model().unwrap().with_score_head(7).unwrap();
    model.save(&model.parameters.clone(), directory, candle_core::DType::F32).unwrap();
    let file = directory.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.push(serde_json::json!({"id": 100_000, "content": "<|never|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}));
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    Checkpoint::open(directory).unwrap()
}

#[test]
fn a_reward_model_with_a_tokenizer_of_its_own_scores_as_with_the_policys() {
    let folder = tempfile::tempdir().unwrap();
    foreign_reward_model(folder.path());
    // Like many, a template that prints a line break after the token that ends a turn.
    let file = folder.path().join("tokenizer_config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("<|end|>{% endfor %}", "<|end|>\\n{% endfor %}")).unwrap();
    let model = Checkpoint::open(folder.path()).unwrap();
    let messages = vec![Message::user("What does the fox do?")];
    assert!(model.text.template().unwrap().render(&messages, false).unwrap().ends_with("<|end|>\n"));
    let devices = Devices::new(1).unwrap();
    let reward = |tokenizer: &str| {
        let member = RewardModel::new("m", &model, tokenizer, Placement::Cpu, Precision::F32, 4096, &devices).unwrap();
        RewardModels { members: vec![member], ensemble: Ensemble::Mean, clip: None }
    };
    let prompt = Arc::new(model.text.encode_chat(&messages).unwrap());
    let mut samples = Vec::new();
    for completion in ["The fox sleeps.", "Go away."] {
        for finish in [Finish::Eos, Finish::Length] {
            let mut tokens = model.text.encode_plain(completion).unwrap();
            tokens.extend(model.architecture.eos.first().filter(|_| finish == Finish::Eos));
            samples.push(Sample {
                prompt: messages[0].content.clone(),
                messages: Arc::new(messages.clone()),
                completion: completion.into(),
                ids: Tokens { prompt: prompt.clone(), completion: Arc::new(tokens) },
                finish,
                ..Sample::default()
            });
        }
    }
    let foreign = reward(rehearsal::embedded::model().unwrap().text.tokenizer_json()).score(&samples).unwrap();
    let own = reward(model.text.tokenizer_json()).score(&samples).unwrap();
    assert_eq!(foreign, own);
    assert!(own.iter().map(|j| j.score).collect::<Vec<_>>().windows(2).all(|w| w[0] != w[1]), "all are the same");
}

#[test]
fn a_reward_model_with_a_tokenizer_of_its_own_reads_the_conversation() {
    let folder = tempfile::tempdir().unwrap();
    let model = foreign_reward_model(folder.path());
    let policy = rehearsal::embedded::model().unwrap();
    let devices = Devices::new(1).unwrap();
    let tokenizer = policy.text.tokenizer_json();
    assert_ne!(model.text.tokenizer_json(), tokenizer);
    let member =
        RewardModel::new("foreign", &model, tokenizer, Placement::Cpu, Precision::F32, 4096, &devices).unwrap();
    let reward = RewardModels { members: vec![member], ensemble: Ensemble::Mean, clip: None };
    let messages = vec![Message::user("What does the fox do?")];
    let samples = ["The fox sleeps.", "Go away."].map(|completion| Sample {
        prompt: messages[0].content.clone(),
        messages: Arc::new(messages.clone()),
        completion: completion.into(),
        finish: Finish::Eos,
        ..Sample::default()
    });
    let decoder = model.frozen(&candle_core::Device::Cpu, candle_core::DType::F32).unwrap();
    for (sample, judged) in samples.iter().zip(reward.score(&samples).unwrap()) {
        let answer = Message { role: "assistant".into(), content: sample.completion.clone() };
        let said = model.text.template().unwrap().render(&[messages[0].clone(), answer], false).unwrap();
        let tokens = model.text.encode_plain(&said).unwrap();
        let read = decoder.architecture().scored_prefix(&tokens);
        let batch = Batch::ends([Sequence { prompt: &[], completion: read }]);
        let want = decoder.values(&batch).unwrap().to_vec1::<f32>().unwrap()[0];
        assert!((judged.score - f64::from(want)).abs() < 1e-6, "{} for {want}", judged.score);
    }
    // And a whole job with it, in which the critic is the policy's own trunk.
    let job = tempfile::tempdir().unwrap();
    let models = format!("models = [\"{}\"]", folder.path().display());
    let text = rewarded_by(&toml(job.path(), 1, ""), &format!("[reward]\n{models}\n"));
    let text = set(&text, "job.algorithm", "ppo");
    let config = rehearsal::Config::from_toml(&text, std::path::Path::new(".")).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(crate::support::run(config).unwrap().step, 1);
}
