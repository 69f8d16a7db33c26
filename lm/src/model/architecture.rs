//! The architecture of a decoder: sizes and features.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rehearsal_kernels::activation::Activation;
use rehearsal_kernels::attention::Heads;

/// Parameters by their Hugging Face names.
pub type Parameters = BTreeMap<String, Tensor>;

/// Sizes and features of a decoder; what `config.json` describes.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Intermediate width of the MLP.
    pub mlp: usize,
    /// Kind of normalisation.
    pub norm: NormKind,
    /// Term added to the variance or mean square before its root.
    pub norm_eps: f64,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether the MLP is gated: `act(gate(x)) · up(x)`; else it is `act(up(x))` (GPT-2).
    pub gated: bool,
    /// How positions are encoded.
    pub position: Position,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Whether the language-model head shares the weight of the embedding.
    pub tied: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised per head (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Whether the outputs of attention and MLP are normalised as well as their inputs (Gemma).
    pub sandwich: bool,
    /// Whether embeddings are multiplied by `sqrt(hidden)` (Gemma).
    pub scaled_embedding: bool,
    /// Attention scores are divided by the square root of this instead of `head_dim` (Gemma).
    pub query_scalar: Option<f64>,
    /// Attention scores are softcapped: `cap · tanh(score / cap)` (Gemma 2).
    pub attention_softcap: Option<f64>,
    /// Logits are softcapped: `cap · tanh(logit / cap)` (Gemma 2).
    pub final_softcap: Option<f64>,
    /// Sliding window: most keys that a query attends to, itself included, in the layers that [have
    /// one](Architecture::slides).
    pub window: Option<usize>,
    /// Whether each layer has the sliding window; empty if all have it.
    pub sliding: Vec<bool>,
    /// Output head.
    pub head: HeadKind,
    /// Beginning-of-sequence token.
    pub bos: Option<u32>,
    /// End-of-sequence tokens.
    pub eos: Vec<u32>,
    /// Padding token.
    pub pad: Option<u32>,
}

impl Default for Architecture {
    /// A Llama whose sizes are 0.
    fn default() -> Self {
        Self {
            model_type: "llama".into(),
            vocab: 0,
            hidden: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            mlp: 0,
            norm: NormKind::Rms,
            norm_eps: 1e-6,
            activation: Activation::Silu,
            gated: true,
            position: Position::Rotary { rope: Rope { theta: 10_000.0, scaling: Scaling::None }, sliding: None },
            context: 2048,
            tied: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sandwich: false,
            scaled_embedding: false,
            query_scalar: None,
            attention_softcap: None,
            final_softcap: None,
            window: None,
            sliding: Vec::new(),
            head: HeadKind::Language,
            bos: None,
            eos: Vec::new(),
            pad: None,
        }
    }
}

/// Normalisation layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm, multiplied by the weight.
    Rms,
    /// RMSNorm, multiplied by one plus the weight (Gemma).
    RmsPlusOne,
    /// LayerNorm with a bias (GPT-2).
    Layer,
}

/// Position encoding.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Rotary (RoPE). Layers with a sliding window have frequencies of their own if `sliding` is given (Gemma 3).
    Rotary {
        /// Frequencies of all layers, or of those without a window.
        rope: Rope,
        /// Frequencies of layers with a sliding window.
        sliding: Option<Rope>,
    },
    /// A learned table, added to the embeddings (GPT-2).
    Learned,
}

/// Output head of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadKind {
    /// Language-model head: logits of the next token.
    Language,
    /// Score head: one scalar per position, by `score.weight` without a bias, for reward models and critics
    /// (`...ForSequenceClassification` with one label).
    Score,
}

/// Settings of rotary position embeddings (RoPE, Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: Scaling,
}

/// Scaling of the rotary frequencies for a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// No scaling.
    None,
    /// Every frequency is divided by the factor.
    Linear {
        /// Divisor of the frequencies; above 0.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated.
    Llama3 {
        /// Divisor of low frequencies; above 0.
        factor: f64,
        /// Frequencies with fewer turns than this in the original context are low.
        low: f64,
        /// Frequencies with more turns than this in the original context are high.
        high: f64,
        /// Context that the model was first trained for, in tokens.
        original_context: f64,
    },
}

impl Rope {
    /// Inverse frequencies `[head_dim / 2]`: `theta^(-2i / head_dim)`, scaled, in f32 as in `transformers`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let base = |i: usize| 1.0 / self.theta.powf(2.0 * i as f64 / head_dim as f64);
        let scaled = |f: f64| match self.scaling {
            Scaling::None => f,
            Scaling::Linear { factor } => f / factor,
            Scaling::Llama3 { factor, low, high, original_context } => {
                let wavelength = std::f64::consts::TAU / f;
                if wavelength < original_context / high {
                    f
                } else if wavelength > original_context / low {
                    f / factor
                } else {
                    let ramp = (original_context / wavelength - low) / (high - low);
                    (1.0 - ramp) * f / factor + ramp * f
                }
            }
        };
        (0..head_dim / 2).map(|i| scaled(base(i)) as f32).collect()
    }
}

impl Architecture {
    /// Attention shape of a layer: heads, scale, window and softcap.
    pub fn attention(&self, layer: usize) -> Heads {
        Heads {
            queries: self.heads,
            keys: self.kv_heads,
            dim: self.head_dim,
            scale: (1.0 / self.query_scalar.unwrap_or(self.head_dim as f64).sqrt()) as f32,
            window: self.window.filter(|_| self.slides(layer)),
            softcap: self.attention_softcap.map(|cap| cap as f32),
        }
    }

    /// Whether a layer has the sliding window.
    pub fn slides(&self, layer: usize) -> bool {
        self.window.is_some() && self.sliding.get(layer).copied().unwrap_or(true)
    }

    /// Factor on the embeddings, if there is one.
    pub fn embedding_scale(&self) -> Option<f64> {
        self.scaled_embedding.then(|| (self.hidden as f64).sqrt())
    }

    /// Tokens of a sequence up to the one that the score is read at: the last that is not the padding token, as in
    /// `transformers`. If padding and end-of-sequence are the same token, that is the token before them. Returns all
    /// tokens if all are padding.
    pub fn scored_prefix<'a>(&self, tokens: &'a [u32]) -> &'a [u32] {
        match self.without_padding(tokens) {
            [] => tokens,
            kept => kept,
        }
    }

    /// Tokens without trailing padding; none of them where all are padding.
    pub fn without_padding<'a>(&self, tokens: &'a [u32]) -> &'a [u32] {
        let end = tokens.iter().rposition(|&t| Some(t) != self.pad).map_or(0, |last| last + 1);
        &tokens[..end]
    }

    /// The same model with another head; a score head is never tied.
    pub fn with_head(mut self, head: HeadKind) -> Self {
        self.head = head;
        self.tied &= head == HeadKind::Language;
        self
    }
}
