//! The reference: the frozen model that the policy's divergence is measured from.

use std::sync::Arc;

use rehearsal_lm::{Checkpoint, Decoder, Precision};

use crate::device::SharedDevice;
use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message, role_status};
use crate::{Devices, Placement, Result, Tokens, passes};

pub(crate) enum ReferenceMsg {
    Logprobs { tokens: Vec<Tokens>, temperature: f64, _permit: Permit, reply: Reply<Vec<Vec<f32>>> },
}
local_message!(ReferenceMsg);

pub(crate) struct Reference {
    decoder: Decoder,
    compute: SharedDevice,
    micro_batch_tokens: usize,
}

impl StateMachine for Reference {
    type Message = ReferenceMsg;

    fn apply(&mut self, message: ReferenceMsg) {
        let ReferenceMsg::Logprobs { tokens, temperature, reply, .. } = message;
        answer(
            reply,
            self.compute.run(|| passes::logprobs(&self.decoder, &tokens, temperature, self.micro_batch_tokens)),
        );
    }
}

/// Handle to the reference.
#[derive(Clone)]
pub struct ReferenceHandle {
    pub(crate) link: Link<ReferenceMsg>,
}

impl ReferenceHandle {
    pub(crate) fn build(
        checkpoint: Arc<Checkpoint>,
        placement: Placement,
        micro_batch_tokens: usize,
        precision: Precision,
        devices: Devices,
    ) -> Build<Reference> {
        Arc::new(move || {
            let compute = devices.get(placement)?;
            let decoder = checkpoint.frozen(&compute.device, precision.dtype())?;
            Ok(Reference { decoder, compute, micro_batch_tokens })
        })
    }

    /// Log-probabilities of each completion's tokens at a temperature: one list per completion, in order.
    pub async fn logprobs(&self, tokens: Vec<Tokens>, temperature: f64) -> Result<Vec<Vec<f32>>> {
        self.link
            .ask("log-probabilities", |_permit, reply| ReferenceMsg::Logprobs { tokens, temperature, _permit, reply })
            .await
    }
}
role_status!(ReferenceHandle);
