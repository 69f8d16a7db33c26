//! `rehearsal generate`: one completion on the CPU in f32.

use std::process::ExitCode;

use candle_core::{DType, Device};
use rehearsal_lm::Message;
use rehearsal_lm::generate::{Generator, Options, Request, Sampling, completion_text};

use super::saved;
use crate::error::Result;

/// Sampling settings and the system message.
pub struct Settings {
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    pub seed: u64,
    pub system: Option<String>,
}

/// Generates a completion of `prompt` and prints it.
pub fn generate(model: &str, prompt: &str, settings: &Settings) -> Result<ExitCode> {
    let checkpoint = saved::model(model)?;
    let mut messages = vec![Message::user(prompt)];
    if let Some(system) = &settings.system {
        messages.insert(0, Message::system(system));
    }
    let prompt = checkpoint.text.encode_chat(&messages)?.into();
    let options = Options {
        sampling: Sampling { temperature: settings.temperature, top_p: settings.top_p, ..Sampling::default() },
        max_new_tokens: settings.max_new_tokens,
        min_new_tokens: 0,
        eos: checkpoint.architecture.eos.clone(),
        stop: Vec::new(),
        seed: settings.seed,
        batch: 1,
    };
    let decoder = checkpoint.frozen(&Device::Cpu, DType::F32)?;
    let mut tokens = Vec::new();
    let request = Request { id: 0, prompt };
    Generator::new(&decoder)?.generate(vec![request], &options, None, &|| false, &mut |c| tokens = c.tokens)?;
    println!("{}", completion_text(&checkpoint.text, &tokens, &[])?);
    Ok(ExitCode::SUCCESS)
}
