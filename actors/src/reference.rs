//! The reference: frozen weights that say how likely a completion was before training.

use std::sync::Arc;

use rehearsal_lm::{Checkpoint, Decoder, Precision};

use crate::device::Seat;
use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::{Devices, Placement, Result, Tokens, passes};

pub(crate) enum ReferenceMsg {
    Logprobs { tokens: Vec<Tokens>, temperature: f64, _ticket: Ticket, reply: Reply<Vec<Vec<f32>>> },
}
local_message!(ReferenceMsg);

pub(crate) struct Reference {
    decoder: Decoder,
    seat: Seat,
    micro_batch_tokens: usize,
}

impl Machine for Reference {
    type Message = ReferenceMsg;

    fn apply(&mut self, message: ReferenceMsg) {
        let ReferenceMsg::Logprobs { tokens, temperature, reply, .. } = message;
        answer(reply, self.seat.run(|| passes::logprobs(&self.decoder, &tokens, temperature, self.micro_batch_tokens)));
    }
}

/// Speaks to the reference.
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
            let seat = devices.seat(placement)?;
            let decoder = checkpoint.frozen(&seat.device, precision.dtype())?;
            Ok(Reference { decoder, seat, micro_batch_tokens })
        })
    }

    /// Log-probabilities of completions, token by token.
    pub async fn logprobs(&self, tokens: Vec<Tokens>, temperature: f64) -> Result<Vec<Vec<f32>>> {
        self.link.ask(|_ticket, reply| ReferenceMsg::Logprobs { tokens, temperature, _ticket, reply }).await
    }
}
role_status!(ReferenceHandle);
