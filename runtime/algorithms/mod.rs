//! Algorithms: one file or folder for each, with its settings, what it loads, its roles and its step.

mod dpo;
mod iterative_dpo;
mod online_dpo;
mod ppo;
mod registry;
mod reward_model;
mod rso;
mod sft;
mod shared;

pub use dpo::Dpo;
pub use iterative_dpo::IterativeDpo;
pub use online_dpo::OnlineDpo;
pub use ppo::{Advantages, CriticSettings, OffPolicy, Ppo, PpoSettings};
pub(crate) use registry::ALGORITHMS;
pub use registry::{Algorithms, Entry};
pub use reward_model::{Normalise, RewardModel};
pub use rso::Rso;
pub use sft::Sft;
pub use shared::minibatches::UpdateSettings;
pub use shared::offline::OfflineSettings;
pub use shared::online::OnlineSettings;
pub use shared::preference::LossSettings;
pub use shared::rounds::RoundSettings;
