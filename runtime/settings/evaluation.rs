//! `[evaluation]`

use crate::config::{Keys, Range, Settings};

/// `[evaluation]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationSettings {
    /// 0: never.
    pub every_steps: u64,
    /// Held-out prompts of an evaluation.
    pub prompts: usize,
    /// Samples kept with each evaluation.
    pub samples: usize,
    /// The number by which evaluations are compared; the best one's model is written to the folder `best`.
    pub best: Option<Measure>,
    /// Evaluations without a better one after which the job ends; 0 for never.
    pub patience: u64,
}

/// A number of evaluations by which they are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// The highest mean score of the answers.
    Reward,
    /// The highest share of pairs ordered as labelled.
    Accuracy,
    /// The highest margin of pairs.
    Margin,
    /// The lowest loss.
    Loss,
}

impl Measure {
    /// Its name in evaluations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Accuracy => "accuracy",
            Self::Margin => "margin",
            Self::Loss => "loss",
        }
    }

    /// Whether a value is better than another.
    pub fn is_better(self, value: f64, than: f64) -> bool {
        if self == Self::Loss { value < than } else { value > than }
    }
}

impl Default for EvaluationSettings {
    fn default() -> Self {
        Self { every_steps: 0, prompts: 32, samples: 3, best: None, patience: 0 }
    }
}

impl Settings for EvaluationSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("evaluation");
        s.integer(
            "every_steps",
            &mut self.every_steps,
            Range::from(0.0),
            "Evaluate on the held-out prompts or rows at the start, every so many steps, and at the end; 0 never.",
        );
        s.integer("prompts", &mut self.prompts, Range::from(1.0), "Held-out prompts at most.");
        s.integer("samples", &mut self.samples, Range::within(0.0, 100.0), "Completions kept with each evaluation.");
        let measures = [Measure::Reward, Measure::Accuracy, Measure::Margin, Measure::Loss];
        let mut choices = vec![("none", None)];
        choices.extend(measures.map(|measure| (measure.name(), Some(measure))));
        s.speed().choice(
            "best",
            &mut self.best,
            &choices,
            "Write the model to the folder `best` of the job whenever an evaluation is better than all before it by this number: \
             the highest reward, accuracy or margin, or the lowest loss.",
        );
        let help = "End the job, as if that had been its last step, after so many evaluations in a row that are not better than the \
                    best by `best`; 0: never.";
        s.speed().integer("patience", &mut self.patience, Range::from(0.0), help);
        let (every, patience) = (self.every_steps, self.patience);
        if patience > 0 && self.best.is_none() {
            s.problem("patience", format!("= {patience} needs `evaluation.best`, which says what is better"));
        }
        if self.best.is_some() && every == 0 {
            s.problem("best", "needs evaluations: set `evaluation.every_steps`");
        }
    }
}
