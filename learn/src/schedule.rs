//! Learning-rate schedules as in `transformers`: optimiser step `t`, counted from 0, has the rate of `t`, and warm-up
//! starts at 0.

/// Shape of a schedule after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScheduleKind {
    /// Constant at the peak.
    Constant,
    /// Constant at the peak; warm-up starts at a tenth of it (InstructGPT, C.4).
    ConstantFromTenth,
    /// Linear decay to 0 at the last step.
    Linear,
    /// Cosine decay to `floor` times the peak at the last step.
    Cosine {
        /// Last learning rate as a share of the peak, from 0 to 1.
        floor: f64,
    },
}

/// A learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Shape of the schedule after warm-up.
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps of the job, warm-up included.
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
