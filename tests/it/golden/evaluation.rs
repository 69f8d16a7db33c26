use std::collections::BTreeMap;

use candle_core::DType;
use rehearsal_learn::evaluation::judge::{BothOrders, first_position_rate};
use rehearsal_learn::evaluation::ratings::{Game, Scale, bradley_terry, elo};
use rehearsal_learn::evaluation::rewardbench::{self, Accuracy};
use rehearsal_learn::evaluation::winrate::{WinRate, agree, length_controlled};

use super::{Golden, flat};

#[test]
fn golden_judge_in_both_orders() {
    let golden = Golden::load("judge_position_average");
    let pairs = |key: &str| -> Vec<[f64; 2]> { flat(&golden.input(key, DType::F64)).as_chunks::<2>().0.to_vec() };
    let verdicts: Vec<BothOrders> = pairs("logits_order_12")
        .into_iter()
        .zip(pairs("logits_order_21"))
        .map(|(a, b)| BothOrders::from_logits(a, b))
        .collect();
    let check = |key: &str, of: &dyn Fn(&BothOrders) -> f64| {
        golden.check_numbers(key, &verdicts.iter().map(of).collect::<Vec<_>>(), false);
    };
    check("prob_order_12", &|v| v.shown_first);
    check("prob_order_21", &|v| v.shown_second);
    check("prob", &BothOrders::probability);
    check("y1_preferred", &|v| f64::from(v.probability() > 0.5));
    check("consistent", &|v| f64::from(v.consistent()));
    let share = verdicts.iter().filter(|v| v.consistent()).count() as f64 / verdicts.len() as f64;
    golden.check_numbers("position_consistency", &[share], false);
    golden.check_numbers("first_position_rate", &[first_position_rate(&verdicts)], false);
}

#[test]
fn golden_judge_win_tie_loss() {
    let golden = Golden::load("judge_win_tie_loss");
    let verdicts = |key: &str| -> Vec<i8> { flat(&golden.input(key, DType::F64)).iter().map(|&v| v as i8).collect() };
    let (first, second) = (verdicts("verdict_order_1"), verdicts("verdict_order_2"));
    let last: Vec<i8> = first.iter().zip(&second).map(|(&a, &b)| agree(a, b)).collect();
    golden.check_numbers("final", &last.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), false);
    let rate = WinRate::of(&last);
    golden.check_numbers("win", &[rate.win], false);
    golden.check_numbers("tie", &[rate.tie], false);
    golden.check_numbers("loss", &[rate.loss], false);
    golden.check_numbers("win_rate", &[rate.rate(golden.param("tie_weight"))], false);
    let same = first.iter().zip(&second).filter(|(a, b)| a == b).count() as f64 / first.len() as f64;
    golden.check_numbers("position_consistency", &[same], false);
}

#[test]
fn golden_length_controlled_win_rate() {
    let golden = Golden::load("length_controlled_winrate");
    let preferences = flat(&golden.input("preference", DType::F64));
    let differences = flat(&golden.input("length_difference", DType::F64));
    let rate = length_controlled(&preferences, &differences, golden.param("ridge")).expect("different lengths");
    golden.check_numbers("coef_length", &[rate.coefficient], false);
    golden.check_numbers("intercept", &[rate.intercept], false);
    golden.check_numbers("lc_winrate", &[rate.rate], false);
    golden.check_numbers("std_length_difference", &[rate.deviation], false);
    let raw = preferences.iter().sum::<f64>() / preferences.len() as f64;
    golden.check_numbers("raw_winrate", &[raw], false);
}

fn check_sections(golden: &Golden, subsets: &BTreeMap<String, f64>) {
    let sections = rewardbench::sections(subsets);
    let wanted = golden.value["outputs"]["sections"].as_object().expect("sections");
    assert_eq!(sections.len(), wanted.len());
    for (name, want) in wanted {
        golden.check_values(name, &[sections[name.as_str()]], &[want.as_f64().unwrap()], false);
    }
    if golden.value["outputs"].get("score").is_some() {
        golden.check_numbers("score", &[rewardbench::score(&sections)], false);
    }
}

#[test]
fn golden_rewardbench_sections() {
    let golden = Golden::load("rewardbench_sections");
    let counts = golden.value["params"]["example_counts"].as_object().expect("counts");
    let ours: BTreeMap<&str, f64> = rewardbench::SECTIONS.iter().flat_map(|(_, parts)| parts.iter().copied()).collect();
    assert_eq!(counts.len(), ours.len());
    for (subset, count) in counts {
        assert_eq!(count.as_f64().unwrap(), ours[subset.as_str()], "{subset}");
    }
    let accuracies = golden.value["inputs"]["subset_accuracy"].as_object().expect("accuracies");
    let subsets = accuracies.iter().map(|(name, x)| (name.clone(), x.as_f64().unwrap())).collect();
    check_sections(&golden, &subsets);
}

#[test]
fn golden_rewardbench_pairs() {
    let golden = Golden::load("rewardbench_pairs");
    let subsets = golden.value["inputs"]["subset"].as_array().expect("subsets");
    let (chosen, rejected) =
        (flat(&golden.input("chosen_scores", DType::F64)), flat(&golden.input("rejected_scores", DType::F64)));
    let (mut by_subset, mut all) = (BTreeMap::<String, Accuracy>::new(), Accuracy::default());
    for ((subset, &chosen), &rejected) in subsets.iter().zip(&chosen).zip(&rejected) {
        by_subset.entry(subset.as_str().unwrap().into()).or_default().add(chosen, rejected);
        all.add(chosen, rejected);
    }
    golden.check_numbers("pair_accuracy", &[all.rate()], false);
    golden.check_numbers("ties", &[all.ties as f64 / all.pairs as f64], false);
    let rates: BTreeMap<String, f64> = by_subset.iter().map(|(name, a)| (name.clone(), a.rate())).collect();
    let wanted = golden.value["outputs"]["subset_accuracy"].as_object().expect("accuracies");
    assert_eq!(rates.len(), wanted.len());
    for (name, want) in wanted {
        golden.check_values(name, &[rates[name]], &[want.as_f64().unwrap()], false);
    }
    check_sections(&golden, &rates);
}

fn games(golden: &Golden) -> (Vec<Game>, usize) {
    let (first, second) = (golden.integers("model_a"), golden.integers("model_b"));
    let outcomes = flat(&golden.input("outcome_a", DType::F64));
    let models = first.iter().chain(&second).max().unwrap() + 1;
    let games = first.into_iter().zip(second).zip(outcomes);
    (games.map(|((first, second), outcome)| Game { first, second, outcome }).collect(), models)
}

fn scale(golden: &Golden) -> Scale {
    Scale { points: golden.param("scale"), base: golden.param("base"), start: golden.param("init") }
}

#[test]
fn golden_elo() {
    for name in ["elo_k4", "elo_k32"] {
        let golden = Golden::load(name);
        let (games, models) = games(&golden);
        let ratings = elo(&games, models, golden.param("k"), &scale(&golden)).unwrap();
        golden.check_numbers("ratings", &ratings, false);
    }
}

#[test]
fn golden_bradley_terry() {
    let golden = Golden::load("bradley_terry_mle");
    let (games, models) = games(&golden);
    let fit = bradley_terry(&games, models).unwrap();
    golden.check_numbers("theta", &fit.theta, false);
    golden.check_numbers("elo", &fit.ratings(&scale(&golden)), false);
    golden.check_numbers("nll", &[fit.nll], false);
}
