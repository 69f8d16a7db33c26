//! Verifiable rewards against TRL's.

use rehearsal::rewards::verify::length::{Cosine, cosine_scaled, soft_overlong};
use rehearsal::rewards::verify::math::{Extraction, is_correct};
use rehearsal::rewards::verify::repetition::repetition;
use rehearsal::rewards::verify::thinking::{after_thinking, is_think_format};
use serde_json::Value;

use super::Golden;

fn texts<'a>(golden: &'a Golden, key: &str) -> Vec<&'a str> {
    golden.value["inputs"][key].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// The rewards that are wanted; NaN where there is none.
fn wanted(golden: &Golden, key: &str) -> Vec<f64> {
    let all = golden.value["outputs"][key].as_array().unwrap();
    all.iter().map(|reward| reward.as_f64().unwrap_or(f64::NAN)).collect()
}

fn check(golden: &Golden, key: &str, got: &[f64]) {
    let wanted = wanted(golden, key);
    assert!(!got.is_empty() && got.len() == wanted.len(), "{} for {}", got.len(), wanted.len());
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() < 1e-9, "{key} {at}: {got} is not {wanted}");
    }
}

#[test]
fn golden_think_format() {
    let golden = Golden::load("reward_think_format");
    let got: Vec<f64> = texts(&golden, "completions").into_iter().map(|t| f64::from(is_think_format(t))).collect();
    check(&golden, "rewards", &got);
}

#[test]
fn golden_soft_overlong() {
    let golden = Golden::load("reward_soft_overlong");
    let (max, cache) = (golden.param("max_length") as usize, golden.param("cache") as usize);
    let lengths = golden.value["inputs"]["lengths"].as_array().unwrap();
    let got: Vec<f64> = lengths.iter().map(|n| soft_overlong(n.as_u64().unwrap() as usize, max, cache)).collect();
    check(&golden, "trl", &got);
}

#[test]
fn golden_repetition() {
    for name in ["reward_repetition", "reward_repetition_bigram"] {
        let golden = Golden::load(name);
        let (n, penalty) = (golden.param("ngram_size") as usize, golden.param("max_penalty"));
        let rows: Vec<Vec<u32>> = serde_json::from_value(golden.value["inputs"]["completion_ids"].clone()).unwrap();
        let got: Vec<f64> = rows.iter().map(|tokens| repetition(tokens, n, penalty)).collect();
        check(&golden, "rewards", &got);
    }
}

#[test]
fn golden_cosine_scaled() {
    let golden = Golden::load("reward_cosine_scaled");
    let bounds = Cosine {
        tokens_max: golden.param("max_len") as usize,
        correct: [golden.param("max_value_correct"), golden.param("min_value_correct")],
        wrong: [golden.param("min_value_wrong"), golden.param("max_value_wrong")],
    };
    let inputs = |key: &str| golden.value["inputs"][key].as_array().unwrap().clone();
    let wanted = wanted(&golden, "rewards");
    for ((correct, tokens), wanted) in inputs("correct").iter().zip(inputs("lengths")).zip(wanted) {
        let Some(correct) = correct.as_f64() else {
            assert!(wanted.is_nan(), "without a verdict there is no reward");
            continue;
        };
        let got = cosine_scaled(correct == 1.0, tokens.as_u64().unwrap() as usize, &bounds);
        assert!((got - wanted).abs() < 1e-9, "{correct} {tokens}: {got} is not {wanted}");
    }
}

#[test]
fn golden_accuracy() {
    for (name, thinks) in [("reward_accuracy", false), ("reward_reasoning_accuracy", true)] {
        let golden = Golden::load(name);
        let wanted = golden.value["outputs"]["rewards"].as_array().unwrap();
        let all = texts(&golden, "completions").into_iter().zip(texts(&golden, "solutions")).zip(wanted);
        for ((completion, solution), wanted) in all {
            let got = match thinks {
                false => is_correct(completion, solution, Extraction::Boxed),
                // Without the end of thinking the reward is 0, whatever the solution.
                true => {
                    after_thinking(completion).map_or(Some(false), |text| is_correct(text, solution, Extraction::Boxed))
                }
            };
            let got = got.map_or(Value::Null, |correct| Value::from(f64::from(correct)));
            assert_eq!(&got, wanted, "{name}: {completion} for {solution}");
        }
    }
}
