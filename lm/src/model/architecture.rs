//! What a decoder is made of.

use crate::kernels::attention::Heads;

/// One decoder, described by its features.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: String,
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub activation: Activation,
    /// The MLP multiplies an activated gate with a second projection; without, it activates the one it has (GPT-2).
    pub gated: bool,
    pub position: Position,
    /// Positions the model was made for.
    pub context: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// Biases of queries, keys and values.
    pub qkv_bias: bool,
    /// Bias of the attention's output.
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// Queries and keys are normalised head by head (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Attention and MLP are normalised after they are computed too (Gemma).
    pub sandwich: bool,
    /// Embeddings are multiplied by the root of their width (Gemma).
    pub scaled_embedding: bool,
    /// Scores are divided by the root of this in the place of `head_dim` (Gemma).
    pub query_scalar: Option<f64>,
    /// Scores are bent to `cap · tanh(score / cap)` (Gemma 2).
    pub attention_softcap: Option<f64>,
    /// Logits likewise.
    pub final_softcap: Option<f64>,
    /// Keys a query sees at most, itself included, in the layers that [slide](Architecture::slides).
    pub window: Option<usize>,
    /// Which layers have the window; empty for all.
    pub sliding: Vec<bool>,
    pub head: HeadKind,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

impl Default for Architecture {
    /// A Llama without sizes.
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

/// How rows are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm, times the weight.
    Rms,
    /// RMSNorm, times one plus the weight (Gemma).
    RmsPlusOne,
    /// LayerNorm with a bias (GPT-2).
    Layer,
}

/// Activation of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
}

/// How a token knows its place.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Rotary; the layers that slide may have frequencies of their own (Gemma 3).
    Rotary { rope: Rope, sliding: Option<Rope> },
    /// A learned table added to the embedding (GPT-2).
    Learned,
}

/// What stands on top of the trunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadKind {
    /// The next token.
    Language,
    /// One number for each position, `score.weight` without a bias: reward models and critics
    /// (`...ForSequenceClassification` with one label).
    Score,
}

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

/// How frequencies are stretched for a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    None,
    /// Every frequency divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original_context: f64,
    },
}

impl Rope {
    /// `theta^(-2i/d)` for each pair of a head, scaled, in f32 as `transformers` has them.
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
    /// Heads, scale, window and softcap of a layer.
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

    /// Whether a layer has the window.
    pub fn slides(&self, layer: usize) -> bool {
        self.window.is_some() && self.sliding.get(layer).copied().unwrap_or(true)
    }

    /// Factor on the embeddings.
    pub fn embedding_scale(&self) -> Option<f64> {
        self.scaled_embedding.then(|| (self.hidden as f64).sqrt())
    }

    /// Tokens of a sequence up to the one a score is read at: the last that is no padding (transformers' rule; where
    /// padding is the end-of-sequence token, the score is read before it). All of them when there is none.
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

    /// The same trunk under another head.
    pub fn with_head(mut self, head: HeadKind) -> Self {
        self.head = head;
        self.tied &= head == HeadKind::Language;
        self
    }
}
