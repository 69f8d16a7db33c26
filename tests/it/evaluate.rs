//! `rehearsal evaluate` as a user runs it.

use std::path::Path;

use serde_json::Value;

use crate::support::{rehearsal, stderr, stdout};

fn json(args: &[&str]) -> Value {
    let output = rehearsal(&[args, &["--json", "-"]].concat());
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn write(folder: &Path, name: &str, rows: &[Value]) -> String {
    let path = folder.join(name);
    let lines: String = rows.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(&path, lines).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn ratings_come_from_games() {
    let folder = tempfile::tempdir().unwrap();
    let game = |a: &str, b: &str, winner: &str| serde_json::json!({"model_a": a, "model_b": b, "winner": winner});
    let rows = [
        game("x", "y", "model_a"),
        game("x", "y", "model_a"),
        game("y", "x", "model_a"),
        game("y", "z", "model_a"),
        game("z", "x", "tie"),
    ];
    let report = json(&["evaluate", "ratings", &write(folder.path(), "games.jsonl", &rows)]);
    let rating = |kind: &str, name: &str| report[kind][name].as_f64().unwrap();
    for kind in ["bradley_terry", "elo"] {
        assert!(rating(kind, "x") > rating(kind, "z"), "{report}");
    }
    let sum: f64 = ["x", "y", "z"].map(|name| rating("bradley_terry", name)).iter().sum();
    assert!((sum - 3000.0).abs() < 1e-6, "{report}");
    let alone = write(folder.path(), "alone.jsonl", &rows[..2]);
    let output = rehearsal(&["evaluate", "ratings", &alone]);
    assert!(!output.status.success() && stderr(&output).contains("`y` never wins against"), "{}", stderr(&output));
}

#[test]
fn a_reward_model_is_measured_by_subset_and_section() {
    let folder = tempfile::tempdir().unwrap();
    let row = |i: usize| {
        let subset = ["alpacaeval-easy", "donotanswer", "my-own"][i % 3];
        serde_json::json!({"prompt": format!("Who {i}?"), "chosen": "The dog. Thank you.", "rejected": "Nobody.", "subset": subset})
    };
    let mut rows: Vec<Value> = (0..12).map(row).collect();
    rows.push(serde_json::json!({"prompt": "Who?"}));
    let file = write(folder.path(), "pairs.jsonl", &rows);
    let model = rehearsal::embedded::model().unwrap().with_score_head(3).unwrap();
    let path = folder.path().join("model");
    model.save(&model.parameters, &path, candle_core::DType::F32).unwrap();
    let report = json(&["evaluate", "reward-model", path.to_str().unwrap(), &file]);
    assert_eq!((&report["pairs"], &report["dropped"]), (&12.into(), &1.into()), "{report}");
    assert_eq!(report["subsets"].as_object().unwrap().len(), 3);
    assert_eq!(report["sections"].as_object().unwrap().keys().collect::<Vec<_>>(), ["Chat", "Safety"]);
    let output = rehearsal(&["evaluate", "reward-model", "embedded", &file]);
    assert!(stderr(&output).contains("no `score` head"), "{}", stderr(&output));
}

#[test]
fn a_model_ties_with_itself_and_the_page_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    let prompts: Vec<Value> = (0..6).map(|i| serde_json::json!({"prompt": format!("What does fox {i} do?")})).collect();
    let prompts = write(folder.path(), "prompts.jsonl", &prompts);
    let model = rehearsal::embedded::model().unwrap().with_score_head(3).unwrap();
    let reward = folder.path().join("reward");
    model.save(&model.parameters, &reward, candle_core::DType::F32).unwrap();
    let page = folder.path().join("page.html");
    let report = json(&[
        "evaluate",
        "models",
        "embedded",
        "embedded",
        "--prompts",
        &prompts,
        "--reward-model",
        reward.to_str().unwrap(),
        "--max-new-tokens",
        "16",
        "--html",
        page.to_str().unwrap(),
    ]);
    assert_eq!((&report["tie"], &report["win_rate"]), (&1.0.into(), &0.5.into()), "{report}");
    assert_eq!(report["results"].as_array().unwrap().len(), 6);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("<svg") && !page.contains("<script") && page.contains("What does fox 3 do?"));
}

#[test]
fn a_judge_must_be_named_and_its_file_readable() {
    let folder = tempfile::tempdir().unwrap();
    let row = serde_json::json!({"prompt": "Who?", "first": "a", "second": "b", "verdict": "maybe"});
    let file = write(folder.path(), "judged.jsonl", &[row]);
    let output = rehearsal(&["evaluate", "judge", &file]);
    assert!(stderr(&output).contains("--judge-model or --judge-url"), "{}", stderr(&output));
    let output = rehearsal(&["evaluate", "judge", &file, "--judge-url", "http://127.0.0.1:9/v1"]);
    assert!(stderr(&output).contains("line 1: has the verdict `maybe`"), "{}", stderr(&output));
    assert!(stdout(&rehearsal(&["evaluate", "--help"])).contains("reward-model"));
}
