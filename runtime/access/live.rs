//! Answers of a running job: by its roles, and by its driver between two steps.

use std::sync::Arc;

use rehearsal_actors::{ArchivistHandle, PolicyHandle, ReferenceHandle};
use rehearsal_lm::Text;
use rehearsal_lm::generate::{Request as Prompt, completion_text};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::records;
use super::request::{Control, Generate, Generated, Reply, Request};
use super::tokens::{Score, ScoredTokens};
use crate::data::PromptsSettings;
use crate::driver::{Command, CommandReply};
use crate::error::{Error, Result};
use crate::status::JobStatus;

/// What of a running job answers requests.
#[derive(Clone)]
pub(crate) struct Live {
    pub archivist: ArchivistHandle,
    /// `None` where a reward model is trained.
    pub policy: Option<PolicyHandle>,
    pub reference: Option<ReferenceHandle>,
    /// Tokenizer and chat template of the trained model.
    pub text: Arc<Text>,
    /// Its end-of-sequence tokens.
    pub eos: Arc<[u32]>,
    /// How prompts become tokens.
    pub prompts: Arc<PromptsSettings>,
    pub cancel: CancellationToken,
    pub pause: watch::Sender<bool>,
    pub commands: mpsc::UnboundedSender<Command>,
    pub status: watch::Receiver<JobStatus>,
}

impl Live {
    /// Answers a request. The job's results do not depend on it.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] once the job has ended, [`Error::NoPolicy`] where there is nothing to generate with, and the errors
    /// of the roles.
    pub async fn answer(&self, request: Request) -> Result<Reply> {
        let answered = self.ask(request).await;
        // A role that is gone because its job has ended is no failure of the role.
        if self.commands.is_closed() && answered.as_ref().is_err_and(|e| e.is_death()) {
            return Err(Error::Ended);
        }
        answered
    }

    async fn ask(&self, request: Request) -> Result<Reply> {
        Ok(match request {
            Request::Status => Reply::Status(Box::new(self.status.borrow().clone())),
            Request::Generate(request) => Reply::Generated(self.generate(request).await?),
            Request::Export { directory, dtype } => {
                let dtype = dtype.into();
                Reply::Exported { step: self.command(|reply| Command::Export { directory, dtype, reply }).await? }
            }
            Request::Checkpoints => self.archivist.read(records::checkpoints).await?,
            Request::Preferences(query) => self.archivist.read(move |store| records::preferences(store, query)).await?,
            Request::Rollouts { step } => self.archivist.read(move |store| records::rollouts(store, step)).await?,
            Request::Verify => self.archivist.read(records::verify).await?,
            Request::Brief(query) => self.archivist.read(move |store| records::brief(store, query)).await?,
            Request::Score(request) => Reply::Scored(self.score(request).await?),
            Request::Overrule(overrule) => {
                // Its own error, not the store's, says what is wrong with the ranking.
                let record = self.archivist.read(move |store| Ok(overrule.record(store))).await??;
                self.archivist.log_preferences(vec![record]).await?;
                Reply::Overruled
            }
            Request::Control(control) => Reply::Controlled { step: self.control(control).await? },
        })
    }

    async fn control(&self, control: Control) -> Result<Option<u64>> {
        match control {
            Control::Pause => drop(self.pause.send_replace(true)),
            Control::Unpause => drop(self.pause.send_replace(false)),
            Control::Stop => self.cancel.cancel(),
            Control::Checkpoint => return self.checkpoint().await.map(Some),
        }
        Ok(None)
    }

    /// Log-probabilities of a completion under the current weights, and under the reference if there is one.
    async fn score(&self, request: Score) -> Result<ScoredTokens> {
        let policy = self.policy.as_ref().ok_or(Error::NoPolicy)?;
        let tokens = request.encode(&self.text, &self.prompts)?;
        let version = self.status.borrow().counters.updates;
        let of_policy = policy.logprobs(vec![tokens.clone()], 1.0).await?.concat();
        let of_reference = match &self.reference {
            Some(reference) => Some(reference.logprobs(vec![tokens.clone()], 1.0).await?.concat()),
            None => None,
        };
        ScoredTokens::new(&self.text, &tokens.completion, &of_policy, of_reference.as_deref(), version)
    }

    /// Saves a checkpoint between two steps; returns its step.
    pub async fn checkpoint(&self) -> Result<u64> {
        self.command(|reply| Command::Checkpoint { reply }).await
    }

    async fn command(&self, command: impl FnOnce(CommandReply) -> Command) -> Result<u64> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| Error::Ended)?;
        match answer.await {
            Ok(result) => result,
            Err(_) if self.commands.is_closed() => Err(Error::Ended),
            Err(_) => Err(rehearsal_actors::Error::Died { role: "driver", reason: None }.into()),
        }
    }

    async fn generate(&self, request: Generate) -> Result<Generated> {
        let policy = self.policy.as_ref().ok_or(Error::NoPolicy)?;
        let options = request.options(&self.eos)?;
        let prompt = Prompt { id: 0, prompt: request.encode(&self.text)?.into() };
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        // Dropped if the caller gives up, which ends the generation.
        let _guard = cancel.clone().drop_guard();
        let version = policy.generate(vec![prompt], options, 0, sender, cancel).await?;
        let completion = receiver.recv().await.ok_or(Error::Ended)?;
        let text = completion_text(&self.text, &completion.tokens, &[])?;
        Ok(Generated::new(text, completion.tokens.len(), completion.finish, version))
    }
}
