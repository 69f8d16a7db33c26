//! When a checkpoint is due: after a fixed number of steps, or as often as its share of the time allows (CheckFreq, Mohan
//! et al., FAST 2021).

use std::collections::VecDeque;
use std::time::Duration;

use crate::settings::CheckpointSettings;

/// Measurements that a median is taken of.
const KEPT: usize = 9;
/// Steps without a checkpoint before the first one.
const WARM_UP: usize = 3;
/// Of so many checkpoints that would be made one after the other, one is left out, to see what a step takes without.
const REFRESH: u64 = 32;

/// The number of steps between two checkpoints.
pub struct Interval {
    settings: CheckpointSettings,
    /// Times of the last steps during which no checkpoint was written, and of those during which one was.
    without: VecDeque<Duration>,
    with: VecDeque<Duration>,
    steps_between: u64,
    /// Checkpoints since one was left out.
    in_a_row: u64,
}

impl Interval {
    /// As the settings say.
    pub fn new(settings: CheckpointSettings) -> Self {
        let steps_between = if settings.overhead > 0.0 { 1 } else { settings.every_steps };
        Self { settings, without: VecDeque::new(), with: VecDeque::new(), steps_between, in_a_row: 0 }
    }

    /// Steps between two checkpoints, as of now.
    pub fn steps(&self) -> u64 {
        self.steps_between
    }

    /// Whether a checkpoint is due after `step` steps, of which the newest checkpoint has `saved`.
    pub fn is_due(&mut self, step: u64, saved: Option<u64>) -> bool {
        if self.settings.overhead == 0.0 {
            return step.is_multiple_of(self.settings.every_steps);
        }
        if self.without.len() < WARM_UP || step < saved.unwrap_or(0) + self.steps_between {
            return false;
        }
        let refresh = self.steps_between == 1 && self.in_a_row >= REFRESH;
        self.in_a_row = if refresh { 0 } else { self.in_a_row + 1 };
        !refresh
    }

    /// Notes how long a step took, and whether a checkpoint was written meanwhile. Returns the new number of steps between
    /// two, if it has changed.
    pub fn step_took(&mut self, time: Duration, with_checkpoint: bool) -> Option<u64> {
        if self.settings.overhead == 0.0 {
            return None;
        }
        note(if with_checkpoint { &mut self.with } else { &mut self.without }, time);
        let without = median(&self.without)?.as_secs_f64().max(1e-6);
        let cost = median(&self.with)?.as_secs_f64() - without;
        let steps = (cost / (self.settings.overhead * without)).ceil() as u64;
        let steps = steps.clamp(1, self.settings.every_steps.max(1));
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
        assert_eq!(interval.step_took(MS, false), None);
        assert_eq!(interval.step_took(1000 * MS, true), None);
        assert!(interval.is_due(20, Some(10)) && !interval.is_due(21, Some(10)));
    }

    #[test]
    fn the_interval_follows_what_checkpoints_cost() {
        let settings = CheckpointSettings { every_steps: 500, overhead: 0.035, ..CheckpointSettings::default() };
        let mut interval = Interval::new(settings);
        for _ in 0..WARM_UP {
            assert!(!interval.is_due(1, None), "it does not know yet what a step takes");
            interval.step_took(100 * MS, false);
        }
        assert!(interval.is_due(4, None));
        assert_eq!(interval.step_took(103 * MS, true), None, "3 of 100 ms are less than 3.5 %");
        let due = (5..5 + 2 * REFRESH).filter(|step| interval.is_due(*step, Some(step - 1))).count() as u64;
        assert!((2 * REFRESH - 3..2 * REFRESH).contains(&due), "one is left out now and then: {due}");
        for _ in 0..KEPT {
            interval.step_took(135 * MS, true);
        }
        assert_eq!(interval.steps(), 10);
        assert!(interval.is_due(11, Some(1)) && !interval.is_due(10, Some(1)));
        for _ in 0..KEPT {
            interval.step_took(Duration::from_secs(9), true);
        }
        assert_eq!(interval.steps(), 500, "`every_steps` is the most");
    }
}
