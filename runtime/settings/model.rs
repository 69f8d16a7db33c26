//! `[model]`

use rehearsal_lm::Precision;

use crate::config::{Keys, ModelSource, Settings};

/// `[model]`
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSettings {
    /// The model to train; `None` is the embedded one.
    pub policy: Option<ModelSource>,
    /// `None` is the policy as it was at the start.
    pub reference: Option<ModelSource>,
    /// Precision of matrix products, and of weights that are only read.
    pub dtype: Precision,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self { policy: None, reference: None, dtype: Precision::F32 }
    }
}

impl ModelSettings {
    /// The model to train.
    pub fn policy(&self) -> ModelSource {
        self.policy.clone().unwrap_or_default()
    }

    /// The reference.
    pub fn reference(&self) -> ModelSource {
        self.reference.clone().unwrap_or_else(|| self.policy())
    }
}

impl Settings for ModelSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("model");
        if let (None, Some(path)) = (&self.policy, s.earlier().policy.clone()) {
            self.policy = Some(ModelSource::Path(path));
        }
        s.model(
            "policy",
            &mut self.policy,
            "The model to train. Without it, that of the last stage, or the tiny one inside this program.",
        );
        s.model(
            "reference",
            &mut self.reference,
            "The model that the KL divergence is measured to. Without it, the policy as it was at the start.",
        );
        s.choice(
            "dtype",
            &mut self.dtype,
            &[("f32", Precision::F32), ("bf16", Precision::Bf16)],
            "Precision of matrix products. With `bf16` their factors are rounded to bfloat16 and their sums are f32. The \
             trained weights, gradients and sums stay f32; the reference is held in bf16.",
        );
    }
}
