//! Answers of a running job: by its roles, and by its driver between two steps.

use std::sync::Arc;

use rehearsal_actors::{ArchivistHandle, PolicyHandle};
use rehearsal_lm::Text;
use rehearsal_lm::generate::{Request as Prompt, completion_text};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::records;
use super::request::{Generate, Generated, Reply, Request};
use crate::driver::{Command, CommandReply};
use crate::error::{Error, Result};
use crate::status::JobStatus;

/// What of a running job answers requests.
#[derive(Clone)]
pub(crate) struct Live {
    pub archivist: ArchivistHandle,
    /// `None` where a reward model is trained.
    pub policy: Option<PolicyHandle>,
    /// Tokenizer and chat template of the trained model.
    pub text: Arc<Text>,
    /// Its end-of-sequence tokens.
    pub eos: Arc<[u32]>,
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
            Request::Preferences { query, after } => {
                self.archivist.read(move |store| records::preferences(store, query, after)).await?
            }
            Request::Rollouts { step } => self.archivist.read(move |store| records::rollouts(store, step)).await?,
            Request::Verify => self.archivist.read(records::verify).await?,
        })
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
