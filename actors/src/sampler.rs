//! The sampler: generates completions with weights of the policy that each request brings, beside the policy's own work.

use std::sync::Arc;

use candle_core::DType;
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Checkpoint, Decoder, Lora, Precision};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::device::SharedDevice;
use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message, role_status};
use crate::{Devices, LoraInit, ModelSnapshot, Placement, Result};

/// Settings of the sampler, constant during a job.
#[derive(Debug, Clone)]
pub struct SamplerConfig {
    /// Its device.
    pub placement: Placement,
    /// CPU threads of its own, beside those of the other roles; 0 to take turns with the roles on its device.
    pub threads: usize,
    /// Type that the operands of matrix products are rounded to: the policy's.
    pub precision: Precision,
    /// What the policy's adapters started from, if it trains adapters.
    pub lora: Option<LoraInit>,
}

pub(crate) enum SamplerMsg {
    Generate {
        weights: Arc<ModelSnapshot>,
        requests: Vec<Request>,
        options: Box<Options>,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
        _permit: Permit,
        reply: Reply<()>,
    },
}
local_message!(SamplerMsg);

pub(crate) struct Sampler {
    checkpoint: Arc<Checkpoint>,
    compute: SharedDevice,
    decoder: Decoder,
    lora: Option<Lora>,
    /// Packed weights, and the version of the policy that they are of.
    generator: Option<(u64, Generator)>,
}

impl Sampler {
    pub fn build(checkpoint: Arc<Checkpoint>, config: SamplerConfig, devices: Devices) -> Build<Self> {
        Arc::new(move || {
            let device = devices.get(config.placement)?;
            let compute = match config.threads {
                0 => device,
                threads => device.beside(threads)?,
            };
            let decoder = checkpoint.trainable(&compute.device, DType::F32)?.with_precision(config.precision);
            let lora = config.lora.as_ref().map(|start| start.load(&checkpoint, &compute.device)).transpose()?;
            Ok(Self { checkpoint: checkpoint.clone(), compute, decoder, lora, generator: None })
        })
    }

    fn load(&mut self, weights: &ModelSnapshot) -> Result<Generator> {
        let variables = self.lora.as_ref().map_or(self.decoder.variables(), Lora::variables);
        weights.set_weights(variables)?;
        if let Some(lora) = &self.lora {
            lora.apply(&self.checkpoint, &self.decoder)?;
        }
        Ok(Generator::new(&self.decoder)?)
    }

    fn generate(
        &mut self,
        weights: &ModelSnapshot,
        requests: Vec<Request>,
        options: &Options,
        finished: &UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let compute = self.compute.clone();
        compute.run(|| {
            let mut generator = match self.generator.take() {
                Some((version, generator)) if version == weights.version => generator,
                _ => self.load(weights)?,
            };
            let mut finished = |completion| {
                let _ = finished.send(completion); // the caller may have been dropped
            };
            let (text, cancelled) = (&self.checkpoint.text, || cancel.is_cancelled());
            let result = generator.generate_recorded(requests, options, Some(text), &cancelled, &mut finished, 0);
            self.generator = Some((weights.version, generator));
            result?;
            Ok(())
        })
    }
}

impl StateMachine for Sampler {
    type Message = SamplerMsg;

    fn apply(&mut self, message: SamplerMsg) {
        let SamplerMsg::Generate { weights, requests, options, finished, cancel, reply, .. } = message;
        answer(reply, self.generate(&weights, requests, &options, &finished, &cancel));
    }
}

/// Handle to the sampler.
#[derive(Clone)]
pub struct SamplerHandle {
    pub(crate) link: Link<SamplerMsg>,
}

impl SamplerHandle {
    /// Samples completions with weights of the policy ([`PolicyHandle::weights`](crate::PolicyHandle::weights)), and sends
    /// each to `finished` when it ends. They are the policy's own completions of that version, bit for bit.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Cancelled`] once `cancel` is cancelled, [`crate::Error::Checkpoint`] if weights are missing.
    pub async fn generate(
        &self,
        weights: Arc<ModelSnapshot>,
        requests: Vec<Request>,
        options: Options,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
    ) -> Result<()> {
        let options = Box::new(options);
        self.link
            .ask("generate", |_permit, reply| SamplerMsg::Generate {
                weights,
                requests,
                options,
                finished,
                cancel,
                _permit,
                reply,
            })
            .await
    }
}
role_status!(SamplerHandle);
