//! Learning rates, step by step, as `transformers` has them: entry `t` is used by optimiser step `t`, and a
//! warm-up starts at 0.

/// Shape of a schedule after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScheduleKind {
    /// The peak for ever.
    Constant,
    /// The peak for ever, after a warm-up from a tenth of it (InstructGPT, C.4).
    ConstantFromTenth,
    /// A line to 0 at the last step.
    Linear,
    /// Half a cosine to `floor` times the peak at the last step.
    Cosine { floor: f64 },
}

/// A learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub peak: f64,
    pub warmup_steps: u64,
    /// Steps of the whole job.
    pub total_steps: u64,
}

impl Schedule {
    /// Learning rate of step `t`, counted from 0.
    pub fn rate(&self, t: u64) -> f64 {
        if t < self.warmup_steps {
            let progress = t as f64 / self.warmup_steps as f64;
            return match self.kind {
                ScheduleKind::ConstantFromTenth => self.peak * (0.1 + 0.9 * progress),
                _ => self.peak * progress,
            };
        }
        let after = (t - self.warmup_steps) as f64 / (self.total_steps.saturating_sub(self.warmup_steps)).max(1) as f64;
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantFromTenth => self.peak,
            ScheduleKind::Linear => self.peak * (1.0 - after).max(0.0),
            ScheduleKind::Cosine { floor } => {
                let half = 0.5 * (1.0 + (std::f64::consts::PI * after).cos());
                self.peak * (half * (1.0 - floor) + floor).max(0.0)
            }
        }
    }
}
