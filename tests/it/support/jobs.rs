//! Jobs of every algorithm on the embedded model, in a few seconds each.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rehearsal::lm::random::Stream;

/// Questions with a good answer, which ends politely, and a bad one; some of the answers also ranked by four.
pub fn data(folder: &Path) {
    let random = Stream::new(1, 2);
    let animals = ["dog", "cat", "wolf", "horse", "bird", "fox", "bear", "cow"];
    let deeds = ["runs to the river", "sings to the moon", "sleeps in the barn", "eats the apple"];
    let (mut demonstrations, mut preferences, mut rankings) = (String::new(), String::new(), String::new());
    for i in 0..64u64 {
        let pick = |n: usize, k: u64| (random.uniform(4 * i + k) * n as f64) as usize;
        let (animal, deed) = (animals[pick(animals.len(), 0)], deeds[pick(deeds.len(), 1)]);
        let prompt = format!("What does the {animal} do?");
        let (good, bad) = (format!("The {animal} {deed}. Thank you."), format!("The {animal} {deed}. Go away."));
        let line = serde_json::json!({"prompt": prompt, "completion": good});
        let _ = writeln!(demonstrations, "{line}");
        let line = serde_json::json!({"prompt": prompt, "chosen": good, "rejected": bad});
        let _ = writeln!(preferences, "{line}");
        let completions = [&good, &bad, &format!("The {animal}."), &format!("The {animal} {deed}.")];
        let line = serde_json::json!({"prompt": prompt, "completions": completions, "ranks": [1, 3, 2, 2]});
        let _ = writeln!(rankings, "{line}");
    }
    std::fs::write(folder.join("demonstrations.jsonl"), demonstrations).unwrap();
    std::fs::write(folder.join("preferences.jsonl"), preferences).unwrap();
    std::fs::write(folder.join("rankings.jsonl"), rankings).unwrap();
}

pub const OFFLINE: &str = "
[evaluation]
every_steps = 8
[checkpoint]
every_steps = 3
[optimizer]
learning_rate = 5e-4
ema_decay = 0.5
";

pub const ROLLOUTS: &str = "
[rollout]
prompts_per_step = 4
completions_per_prompt = 4
max_new_tokens = 16
temperature = 1.0
[reward]
rules = [\"distinct_words\", \"ends_properly\"]
weights = [0.1, 1.0]
[evaluation]
every_steps = 6
prompts = 6
[checkpoint]
every_steps = 2
[optimizer]
learning_rate = 1e-4
";

/// The GPU that tests and their jobs use, such as `cuda:0`: `REHEARSAL_GPU`. Without it an emulated one is tested, and jobs run on
/// the CPU.
pub fn gpu() -> Option<String> {
    std::env::var("REHEARSAL_GPU").ok().filter(|device| !device.is_empty())
}

/// A job's text with its roles on that GPU, unless it places them itself.
pub fn placed(text: String) -> String {
    match gpu() {
        Some(device) if !text.contains("[placement]") => format!("{text}\n[placement]\npolicy = \"{device}\"\n"),
        _ => text,
    }
}

/// A job's file and its directory.
pub fn job(folder: &Path, algorithm: &str, steps: u64, more: &str) -> (PathBuf, PathBuf) {
    data(folder);
    let (file, directory) = (folder.join("job.toml"), folder.join("job"));
    let text = format!("[job]\ndirectory = \"job\"\nalgorithm = \"{algorithm}\"\nsteps = {steps}\nseed = 3\n{more}");
    std::fs::write(&file, placed(text)).unwrap();
    (file, directory)
}

pub const SFT: &str = "[data]\ntrain = [\"demonstrations.jsonl\"]\n";

pub const RANKINGS: &str = "[data]\ntrain = [\"rankings.jsonl\", \"preferences.jsonl\"]\n";

pub const PAIRS: &str = "[data]\ntrain = [\"preferences.jsonl\"]\n";

pub const PPO: &str = "
[ppo]
kl_target = 0.5
kl_horizon = 100
entropy_coef = 0.01
score_placement = \"one_past\"
pretraining = \"demonstrations.jsonl\"
pretraining_weight = 0.2
pretraining_rows = 2
[critic]
learning_rate = 2e-4
[update]
epochs = 2
minibatches = 2
";

pub const LORA: &str = "[lora]\nrank = 4\nalpha = 16\n";

pub const CHAIN: &str = "
[job]
directory = \"chain\"
seed = 3
[checkpoint]
every_steps = 2
[optimizer]
learning_rate = 3e-4
[[stage]]
algorithm = \"sft\"
steps = 8
[stage.data]
train = [\"demonstrations.jsonl\"]
[[stage]]
algorithm = \"reward_model\"
steps = 10
[stage.data]
train = [\"preferences.jsonl\"]
[[stage]]
algorithm = \"ppo\"
steps = 8
[stage.rollout]
prompts_per_step = 4
max_new_tokens = 16
";
