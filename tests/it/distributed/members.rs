//! Groups of members in one process.

use std::path::{Path, PathBuf};

use rehearsal::Config;

use crate::support::edit::replace_once;
use crate::support::jobs::{LORA, OFFLINE, PAIRS, PPO, RANKINGS, ROLLOUTS, SFT, job};
use crate::support::{Remains, rehearsal, resume, run, stderr};

/// Jobs of every kind of objective: name, algorithm, steps, sections.
fn kinds() -> Vec<(&'static str, &'static str, u64, String)> {
    let bf16 = "[model]\ndtype = \"bf16\"\n";
    let rounds = "[update]\nepochs = 2\nminibatches = 2\n";
    let of_dpo = ROLLOUTS.replace("completions_per_prompt = 4", "completions_per_prompt = 2");
    vec![
        ("SFT", "sft", 12, format!("{SFT}{OFFLINE}")),
        ("SFT, LoRA", "sft", 12, format!("{SFT}{OFFLINE}{LORA}")),
        ("reward model", "reward_model", 12, format!("{RANKINGS}{OFFLINE}")),
        ("DPO, bf16", "dpo", 12, format!("{PAIRS}{OFFLINE}{bf16}")),
        ("online DPO", "online_dpo", 12, of_dpo.clone()),
        ("online DPO, bf16", "online_dpo", 12, format!("{of_dpo}{bf16}")),
        ("iterative DPO", "iterative_dpo", 6, format!("{ROLLOUTS}{rounds}")),
        ("PPO", "ppo", 8, format!("{ROLLOUTS}{PPO}")),
        ("PPO, LoRA", "ppo", 8, format!("{ROLLOUTS}{PPO}{LORA}")),
        ("GRPO", "ppo", 8, format!("{ROLLOUTS}[ppo]\nadvantages = \"grpo\"\n")),
    ]
}

/// Writes a job whose policy and critic have `members` members, and whose steps are cut into `leaves` leaves.
fn grouped(
    folder: &Path,
    algorithm: &str,
    steps: u64,
    more: &str,
    leaves: usize,
    members: usize,
) -> (PathBuf, PathBuf) {
    let more = replace_once(more, "[optimizer]\n", &format!("[optimizer]\nleaves = {leaves}\n"));
    let devices = vec!["\"cpu\""; members].join(", ");
    job(folder, algorithm, steps, &format!("{more}[placement]\npolicy = [{devices}]\n"))
}

fn config(folder: &Path, algorithm: &str, steps: u64, more: &str, leaves: usize, members: usize) -> Config {
    let (file, _) = grouped(folder, algorithm, steps, more, leaves, members);
    Config::load(&file).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn any_number_of_members_that_divides_the_leaves_gives_the_same_bits() {
    for (name, algorithm, steps, more) in kinds() {
        let of = |members, shares: &str| {
            let folder = tempfile::tempdir().unwrap();
            let more = replace_once(&more, "[optimizer]\n", &format!("[optimizer]\n{shares}"));
            run(config(folder.path(), algorithm, steps, &more, 4, members)).unwrap_or_else(|e| panic!("{name}: {e}"));
            (
                Remains::of(&folder.path().join("job")),
                std::fs::read(folder.path().join("job/model/model.safetensors")).unwrap(),
            )
        };
        let (want, model) = of(1, "");
        assert_eq!(want.history.len() as u64, steps, "{name}");
        for (members, shares) in [(2, ""), (4, "shard = true\n")] {
            eprintln!("{name}: {members} members {shares}");
            let (got, exported) = of(members, shares);
            got.assert_same(&want);
            assert!(exported == model, "{name}: the exported model differs with {members} members {shares}");
        }
    }
}

#[test]
fn leaves_that_are_no_power_of_two_have_a_fixed_order_too() {
    let of = |members| {
        let folder = tempfile::tempdir().unwrap();
        run(config(folder.path(), "sft", 6, &format!("{SFT}{OFFLINE}"), 6, members)).unwrap();
        Remains::of(&folder.path().join("job"))
    };
    let want = of(1);
    for members in [2, 3, 6] {
        of(members).assert_same(&want);
    }
}

#[test]
fn more_leaves_than_rows_leave_some_empty() {
    let of = |members| {
        let folder = tempfile::tempdir().unwrap();
        run(config(folder.path(), "online_dpo", 4, ROLLOUTS, 16, members)).unwrap();
        Remains::of(&folder.path().join("job"))
    };
    of(4).assert_same(&of(1));
}

#[test]
fn a_job_moves_to_another_number_of_members_and_back() {
    for (algorithm, more) in [("ppo", format!("{ROLLOUTS}{PPO}")), ("online_dpo", ROLLOUTS.into())] {
        let folder = tempfile::tempdir().unwrap();
        run(config(folder.path(), algorithm, 18, &more, 4, 1)).unwrap();
        let want = Remains::of(&folder.path().join("job"));
        let folder = tempfile::tempdir().unwrap();
        run(config(folder.path(), algorithm, 6, &more, 4, 4)).unwrap();
        let sharded = replace_once(&more, "[optimizer]\n", "[optimizer]\nshard = true\n");
        resume(config(folder.path(), algorithm, 12, &sharded, 4, 2)).unwrap();
        resume(config(folder.path(), algorithm, 18, &more, 4, 4)).unwrap();
        Remains::of(&folder.path().join("job")).assert_same(&want);
    }
}

#[test]
fn members_that_do_not_divide_the_leaves_are_an_error_that_names_the_keys() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = grouped(folder.path(), "sft", 4, &format!("{SFT}{OFFLINE}"), 4, 3);
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("`placement.policy`") && said.contains("`optimizer.leaves` = 4"), "{said}");
    assert!(!directory.exists());
    let text = std::fs::read_to_string(&file).unwrap();
    let text = replace_once(&text, "[\"cpu\", \"cpu\", \"cpu\"]", "[\"cpu\", \"cuda:0\"]");
    std::fs::write(&file, text).unwrap();
    let said = stderr(&rehearsal(&["run", file.to_str().unwrap()]));
    assert!(said.contains("`placement.policy` mixes"), "{said}");
}

#[test]
fn other_leaves_are_refused_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), "sft", 4, &format!("{SFT}{OFFLINE}"), 4, 2)).unwrap();
    let error = resume(config(folder.path(), "sft", 8, &format!("{SFT}{OFFLINE}"), 2, 2)).unwrap_err().to_string();
    assert!(error.contains("optimizer.leaves") && error.contains("then: 4") && error.contains("now:  2"), "{error}");
}
