//! The reference: frozen weights that say how likely a completion was before training.

use std::sync::Arc;

use candle_core::DType;
use rehearsal_lm::{Batch, Checkpoint, Decoder, Precision};

use crate::device::Seat;
use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::{Devices, Placement, Result, Tokens};

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
        answer(reply, self.seat.run(|| frozen_logprobs(&self.decoder, &tokens, temperature, self.micro_batch_tokens)));
    }
}

/// Log-probabilities of completions, token by token, in passes of at most `budget` tokens.
pub(crate) fn frozen_logprobs(
    decoder: &Decoder,
    tokens: &[Tokens],
    temperature: f64,
    budget: usize,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(tokens.len());
    let mut rest = tokens;
    while !rest.is_empty() {
        let (mut sum, mut prompt): (usize, Option<&Tokens>) = (0, None);
        let fitting = rest.iter().take_while(|t| {
            // Neighbours share their prompt.
            let shared = prompt.is_some_and(|p| p.prompt == t.prompt);
            sum += t.completion.len() + if shared { 0 } else { t.prompt.len() };
            prompt = Some(t);
            sum <= budget
        });
        let n = fitting.count().max(1);
        let batch = Batch::new(rest[..n].iter().map(Tokens::sequence));
        let flat: Vec<f32> = decoder.logprobs(&batch, temperature)?.to_dtype(DType::F32)?.to_vec1()?;
        all.extend(batch.spans().windows(2).map(|w| flat[w[0]..w[1]].to_vec()));
        rest = &rest[n..];
    }
    Ok(all)
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
