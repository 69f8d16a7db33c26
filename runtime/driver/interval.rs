//! When a checkpoint is due: after a fixed number of steps, or as often as its share of the time allows (CheckFreq, Mohan
//! et al., FAST 2021).

use std::collections::VecDeque;
use std::time::Duration;

use crate::settings::CheckpointSettings;

/// Measurements that a median is taken of.
const KEPT: usize = 9;

/// The number of steps between two checkpoints.
pub struct Interval {
    settings: CheckpointSettings,
    /// Time that each of the last checkpoints kept the job waiting.
    stalls: VecDeque<Duration>,
    /// Time of each of the last steps, without those stalls.
    steps: VecDeque<Duration>,
    steps_between: u64,
}

impl Interval {
    /// As the settings say.
    pub fn new(settings: CheckpointSettings) -> Self {
        let steps_between = if settings.overhead > 0.0 { 1 } else { settings.every_steps };
        Self { settings, stalls: VecDeque::new(), steps: VecDeque::new(), steps_between }
    }

    /// Steps between two checkpoints, as of now.
    pub fn steps(&self) -> u64 {
        self.steps_between
    }

    /// Whether a checkpoint is due after `step` steps, of which the newest checkpoint has `saved`.
    pub fn is_due(&self, step: u64, saved: Option<u64>) -> bool {
        if self.settings.overhead > 0.0 {
            return step >= saved.unwrap_or(0) + self.steps_between;
        }
        step.is_multiple_of(self.settings.every_steps)
    }

    /// Notes how long a step took, without what it waited for a checkpoint.
    pub fn step_took(&mut self, time: Duration) {
        note(&mut self.steps, time);
    }

    /// Notes how long a checkpoint kept the job waiting. Returns the new number of steps between two, if it has changed.
    pub fn checkpoint_took(&mut self, stall: Duration) -> Option<u64> {
        if self.settings.overhead == 0.0 {
            return None;
        }
        note(&mut self.stalls, stall);
        let step = median(&self.steps)?.as_secs_f64().max(1e-6);
        let steps = (median(&self.stalls)?.as_secs_f64() / (self.settings.overhead * step)).ceil();
        let steps = (steps as u64).clamp(1, self.settings.every_steps.max(1));
        let changed = steps != self.steps_between;
        self.steps_between = steps;
        changed.then_some(steps)
    }
}

fn note(times: &mut VecDeque<Duration>, time: Duration) {
    if times.len() == KEPT {
        times.pop_front();
    }
    times.push_back(time);
}

fn median(times: &VecDeque<Duration>) -> Option<Duration> {
    let mut sorted: Vec<Duration> = times.iter().copied().collect();
    sorted.sort();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_fixed_interval_stays() {
        let mut interval = Interval::new(CheckpointSettings { every_steps: 10, ..CheckpointSettings::default() });
        interval.step_took(MS);
        assert_eq!(interval.checkpoint_took(1000 * MS), None);
        assert!(interval.is_due(20, Some(10)) && !interval.is_due(21, Some(10)));
    }

    #[test]
    fn the_interval_follows_what_checkpoints_cost() {
        let settings = CheckpointSettings { every_steps: 500, overhead: 0.035, ..CheckpointSettings::default() };
        let mut interval = Interval::new(settings);
        assert!(interval.is_due(1, None) && !interval.is_due(0, None));
        for _ in 0..5 {
            interval.step_took(100 * MS);
        }
        assert_eq!(interval.checkpoint_took(3 * MS), None, "3 of 100 ms are less than 3.5 %");
        assert_eq!(interval.checkpoint_took(35 * MS), Some(10));
        assert!(interval.is_due(11, Some(1)) && !interval.is_due(10, Some(1)));
        for _ in 0..KEPT {
            interval.checkpoint_took(Duration::from_secs(9));
        }
        assert_eq!(interval.steps(), 500, "`every_steps` is the most");
    }
}
