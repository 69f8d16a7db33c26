//! Hugging Face names and shapes of the parameters.

use super::architecture::{Architecture, HeadKind, NormKind};

/// Weight of a score head, `[1, hidden]`.
pub const SCORE_HEAD: &str = "score.weight";
/// Weight of a language head that is not tied, `[vocab, hidden]`.
pub const LANGUAGE_HEAD: &str = "lm_head.weight";

/// Parameter names that differ between model types.
pub struct Names {
    gpt2: bool,
}

impl Names {
    pub fn embed(&self) -> &'static str {
        if self.gpt2 { "transformer.wte.weight" } else { "model.embed_tokens.weight" }
    }

    /// The table of learned positions.
    pub fn positions(&self) -> &'static str {
        "transformer.wpe.weight"
    }

    /// The final norm, without `.weight` or `.bias`.
    pub fn norm(&self) -> &'static str {
        if self.gpt2 { "transformer.ln_f" } else { "model.norm" }
    }

    /// Name of a part of a layer.
    pub fn layer(&self, layer: usize, part: &str) -> String {
        if self.gpt2 { format!("transformer.h.{layer}.{part}") } else { format!("model.layers.{layer}.{part}") }
    }
}

impl Architecture {
    /// Parameter names of the model type.
    pub(crate) fn names(&self) -> Names {
        Names { gpt2: self.model_type == "gpt2" }
    }

    /// Name of the head's weight; a tied head has the embedding's.
    pub(crate) fn head_name(&self) -> &'static str {
        match self.head {
            HeadKind::Score => SCORE_HEAD,
            HeadKind::Language if self.tied => self.names().embed(),
            HeadKind::Language => LANGUAGE_HEAD,
        }
    }

    /// Norms of width `hidden` in a layer.
    fn norms(&self) -> Vec<&'static str> {
        match (self.model_type.as_str(), self.sandwich) {
            ("gpt2", _) => vec!["ln_1", "ln_2"],
            (_, false) => vec!["input_layernorm", "post_attention_layernorm"],
            (_, true) => vec![
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ],
        }
    }

    /// Every parameter by its Hugging Face name, with its shape, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let names = self.names();
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let gpt2 = self.model_type == "gpt2";
        let mut all = vec![(names.embed().to_string(), vec![self.vocab, h])];
        if gpt2 {
            all.push((names.positions().to_string(), vec![self.context, h]));
        }
        let norm = |all: &mut Vec<(String, Vec<usize>)>, name: String, width: usize, bias: bool| {
            all.push((format!("{name}.weight"), vec![width]));
            if bias {
                all.push((format!("{name}.bias"), vec![width]));
            }
        };
        for i in 0..self.layers {
            let mut linear = |part: &str, out: usize, inp: usize, bias: bool| {
                // GPT-2 stores its matrices as `[inputs, outputs]`.
                let shape = if gpt2 { vec![inp, out] } else { vec![out, inp] };
                all.push((names.layer(i, &format!("{part}.weight")), shape));
                if bias {
                    all.push((names.layer(i, &format!("{part}.bias")), vec![out]));
                }
            };
            if gpt2 {
                linear("attn.c_attn", 3 * h, h, true);
                linear("attn.c_proj", h, h, true);
                linear("mlp.c_fc", self.mlp, h, true);
                linear("mlp.c_proj", h, self.mlp, true);
            } else {
                linear("self_attn.q_proj", q, h, self.qkv_bias);
                linear("self_attn.k_proj", kv, h, self.qkv_bias);
                linear("self_attn.v_proj", kv, h, self.qkv_bias);
                linear("self_attn.o_proj", h, q, self.output_bias);
                linear("mlp.gate_proj", self.mlp, h, self.mlp_bias);
                linear("mlp.up_proj", self.mlp, h, self.mlp_bias);
                linear("mlp.down_proj", h, self.mlp, self.mlp_bias);
            }
            if self.qk_norm {
                norm(&mut all, names.layer(i, "self_attn.q_norm"), self.head_dim, false);
                norm(&mut all, names.layer(i, "self_attn.k_norm"), self.head_dim, false);
            }
            for part in self.norms() {
                norm(&mut all, names.layer(i, part), h, self.norm == NormKind::Layer);
            }
        }
        norm(&mut all, names.norm().to_string(), h, self.norm == NormKind::Layer);
        match self.head {
            HeadKind::Score => all.push((SCORE_HEAD.to_string(), vec![1, h])),
            HeadKind::Language if !self.tied => all.push((LANGUAGE_HEAD.to_string(), vec![self.vocab, h])),
            HeadKind::Language => {}
        }
        all
    }
}
