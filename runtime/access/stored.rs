//! Answers about a job that does not run, from its store.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use rehearsal_actors::Restored;
use rehearsal_lm::generate::{Finish, Generator, Request as Prompt, completion_text};
use rehearsal_lm::{Batch, Checkpoint};
use rehearsal_store::Store;

use super::records;
use super::request::{Generate, Generated, Reply, Request};
use super::tokens::{Score, ScoredTokens};
use crate::error::{At, Error, Result};
use crate::job::{saved_config, saved_day};
use crate::model_directory::Writing;
use crate::models::{dated, load_model};
use crate::status::{JobStatus, STATUS_FILE};

/// Answers a request. Blocking.
pub fn answer(store: &mut Store, request: Request) -> Result<Reply> {
    let directory = store.directory();
    Ok(match request {
        Request::Status => Reply::Status(Box::new(status(directory)?)),
        Request::Generate(request) => Reply::Generated(generate(store, &request)?),
        Request::Export { directory, dtype } => {
            let (model, trained) = model(store)?;
            let writing = Writing::begin(&directory)?;
            model.save(&model.parameters, writing.path(), dtype.into())?;
            writing.end()?;
            Reply::Exported { step: trained.step }
        }
        Request::Checkpoints => records::checkpoints(store)?,
        Request::Preferences(query) => records::preferences(store, query)?,
        Request::Rollouts { step } => records::rollouts(store, step)?,
        Request::Verify => records::verify(store)?,
        Request::Brief(query) => records::brief(store, query)?,
        Request::Score(request) => Reply::Scored(score(store, &request)?),
        Request::Overrule(overrule) => {
            let record = overrule.record(store)?;
            store.log_preferences(&[record])?;
            Reply::Overruled
        }
        Request::Control(_) => {
            return Err(Error::Usage("the job does not run; `rehearsal resume` continues it".into()));
        }
    })
}

/// What the job published last; the default if it has not begun.
pub fn status(directory: &Path) -> Result<JobStatus> {
    let path = directory.join(STATUS_FILE);
    match fs::read(&path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_default()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(JobStatus::default()),
        Err(e) => Err(e).at(&path),
    }
}

/// How far a model is trained.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trained {
    /// Steps of the job.
    pub step: u64,
    /// Updates of the model.
    pub version: u64,
}

/// The model that a job trains, of its newest intact checkpoint: the averaged weights if it averages them, and the initial
/// model before the first checkpoint.
pub fn model(store: &Store) -> Result<(Checkpoint, Trained)> {
    let config = saved_config(store.directory())?;
    let mut checkpoint = dated(load_model(&config.common.model.policy())?, saved_day(store.directory())?);
    let (latest, damaged) = Restored::latest(store)?;
    for note in damaged {
        tracing::warn!("{}", note.0);
    }
    // A reward model in training is in the role of a critic, without a policy.
    let trains_policy = latest.as_ref().map(|latest| latest.models.contains_key("policy"));
    let role = match trains_policy.unwrap_or(!config.algorithm.trains_reward_model()) {
        true => "policy",
        false => "critic",
    };
    if role == "critic" {
        checkpoint = checkpoint.with_score_head(config.common.job.seed)?;
    }
    let Some(latest) = latest else { return Ok((checkpoint, Trained::default())) };
    let missing = || Error::SavedState { reason: format!("the checkpoint has no {role}") };
    let model = latest.models.get(role).ok_or_else(missing)?;
    model.apply_to(&mut checkpoint, config.common.lora_init().as_ref())?;
    Ok((checkpoint, Trained { step: latest.step, version: model.version }))
}

/// Log-probabilities under the trained model and the configured reference, on the CPU in f32.
fn score(store: &Store, request: &Score) -> Result<ScoredTokens> {
    let config = saved_config(store.directory())?;
    if config.algorithm.trains_reward_model() {
        return Err(Error::NoPolicy);
    }
    let (model, trained) = model(store)?;
    let settings = config.algorithm.prompts().cloned().unwrap_or_default();
    let tokens = request.encode(&model.text, &settings)?;
    let logprobs = |model: &Checkpoint| -> Result<Vec<f32>> {
        let decoder = model.frozen(&Device::Cpu, DType::F32)?;
        Ok(decoder.logprobs(&Batch::new([tokens.sequence()]), 1.0)?.to_vec1().map_err(rehearsal_lm::Error::from)?)
    };
    let reference = load_model(&config.common.model.reference())?;
    let (policy, reference) = (logprobs(&model)?, logprobs(&reference)?);
    ScoredTokens::new(&model.text, &tokens.completion, &policy, Some(&reference), trained.version)
}

fn generate(store: &Store, request: &Generate) -> Result<Generated> {
    let (model, trained) = model(store)?;
    complete(&model, request, trained.version)
}

/// A model's completion, on the CPU in f32.
pub fn complete(model: &Checkpoint, request: &Generate, version: u64) -> Result<Generated> {
    let options = request.options(&model.architecture.eos)?;
    let prompt = Prompt { id: 0, prompt: request.encode(&model.text)?.into() };
    let decoder = model.frozen(&Device::Cpu, DType::F32)?;
    let (mut tokens, mut finish) = (Vec::new(), Finish::Length);
    Generator::new(&decoder)?.generate(vec![prompt], &options, None, &|| false, &mut |c| {
        (tokens, finish) = (c.tokens, c.finish);
    })?;
    Ok(Generated::new(completion_text(&model.text, &tokens, &[])?, tokens.len(), finish, version))
}
