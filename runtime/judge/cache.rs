//! Cache of replies, and the budget that they are paid from.

use rehearsal_actors::RewardError;
use rehearsal_store::{CachedReply, Usage};

/// Cache of replies by a hash of judge and question, with the total usage of the job. It outlives the process, so that
/// a resumed job or a second epoch asks no question twice.
pub trait ReplyCache: Send + Sync {
    /// Cached replies, in the order of `keys`; `None` where there is none.
    fn recall(&self, keys: &[String]) -> Result<Vec<Option<CachedReply>>, RewardError>;

    /// Adds replies and the usage of this call, which may exceed the replies' own, in one durable write.
    fn remember(&self, entries: Vec<(String, CachedReply)>, spent: Usage) -> Result<(), RewardError>;

    /// Total usage since the job began.
    fn spent(&self) -> Result<Usage, RewardError>;
}

/// Limits on what a job spends on a judge, over all its runs; 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    /// Questions that may be sent.
    pub calls: u64,
    /// Input and output tokens together.
    pub tokens: u64,
    /// In the currency of the prices.
    pub money: f64,
}

impl Budget {
    /// The limit that `calls` more questions would exceed: what is spent, in words, and the key to raise.
    pub(super) fn exceeded(&self, spent: &Usage, calls: u64) -> Option<(String, &'static str)> {
        let tokens = spent.input_tokens.saturating_add(spent.output_tokens);
        if self.calls > 0 && spent.calls.saturating_add(calls) > self.calls {
            return Some((format!("{} of {} calls, {calls} more wanted", spent.calls, self.calls), "judge.calls_max"));
        }
        if self.tokens > 0 && tokens >= self.tokens {
            return Some((format!("{tokens} of {} tokens", self.tokens), "judge.spend_tokens_max"));
        }
        (self.money > 0.0 && spent.money >= self.money)
            .then(|| (format!("{:.4} of {}", spent.money, self.money), "judge.spend_max"))
    }
}
