//! Ranges of numbers.

use std::fmt;

/// The range that a number must lie in. Every range excludes NaN and infinities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    min: f64,
    max: f64,
    /// `min` itself is excluded.
    open: bool,
}

impl Range {
    /// Any finite number.
    pub const fn any() -> Self {
        Self { min: f64::NEG_INFINITY, max: f64::INFINITY, open: false }
    }

    /// `min` or more.
    pub const fn from(min: f64) -> Self {
        Self { min, max: f64::INFINITY, open: false }
    }

    /// More than `min`.
    pub const fn above(min: f64) -> Self {
        Self { min, max: f64::INFINITY, open: true }
    }

    /// `min` to `max`, both included.
    pub const fn within(min: f64, max: f64) -> Self {
        Self { min, max, open: false }
    }

    /// Above `min`, `max` included.
    pub const fn above_to(min: f64, max: f64) -> Self {
        Self { min, max, open: true }
    }

    /// Whether `x` is finite and lies in the range.
    pub fn holds(&self, x: f64) -> bool {
        x.is_finite() && x <= self.max && if self.open { x > self.min } else { x >= self.min }
    }

    /// The bounds in JSON schema's words.
    pub fn json(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut bounds = serde_json::Map::new();
        if self.min.is_finite() {
            bounds.insert(if self.open { "exclusiveMinimum" } else { "minimum" }.into(), self.min.into());
        }
        if self.max.is_finite() {
            bounds.insert("maximum".into(), self.max.into());
        }
        bounds
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min, max, open } = self;
        match (min.is_finite(), max.is_finite()) {
            (false, _) => f.write_str("any number"),
            (true, false) if *open => write!(f, "above {min}"),
            (true, false) => write!(f, "{min} or more"),
            (true, true) if *open => write!(f, "above {min}, up to {max}"),
            (true, true) => write!(f, "{min} to {max}"),
        }
    }
}
