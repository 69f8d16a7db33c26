//! Properties of what users write: a configuration reads back as it is written.

use std::path::Path;

use proptest::prelude::*;
use rehearsal::Config;

/// A string as TOML writes it, whatever is in it.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("strings serialise").replace('\u{7f}', "\\u007f")
}

prop_compose! {
    fn job()(
        directory in "[a-zäß \"'\\\\#=.\\[\\]\\n\\t😀]{1,12}",
        (seed, steps) in (0..i64::MAX as u64, 1u64..1_000_000),
        (prompts, completions, tokens) in (1usize..9, 2usize..9, 1usize..500),
        (temperature, top_p) in (0.01f64..4.0, 0.01f64..1.0),
        (rate, beta, clip) in (1e-12f64..1.0, 1e-6f64..10.0, 0.01f64..100.0),
        (every, overhead) in (1u64..1000, 0.0f64..0.9),
        stop in proptest::collection::vec("[ -~]{1,6}", 0..3),
    ) -> String {
        let stop: Vec<String> = stop.iter().map(|text| quoted(text)).collect();
        format!(
            "[job]\ndirectory = {}\nseed = {seed}\nsteps = {steps}\n[rollout]\nprompts_per_step = {prompts}\n\
             completions_per_prompt = {completions}\nmax_new_tokens = {tokens}\ntemperature = {temperature}\n\
             top_p = {top_p}\nstop = [{}]\n[reward]\nrules = [\"distinct_words\"]\n[loss]\nbeta = {beta}\n\
             [optimizer]\nlearning_rate = {rate:?}\nmax_grad_norm = {clip}\n[checkpoint]\nevery_steps = {every}\n\
             overhead = {overhead:?}\n",
            quoted(&directory),
            stop.join(", ")
        )
    }
}

proptest! {
    #[test]
    fn a_configuration_reads_back_as_it_is_written(text in job()) {
        let read = |text: &str| Config::from_toml(text, Path::new("/jobs")).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let config = read(&text);
        let written = config.to_toml();
        let again = read(&written);
        prop_assert_eq!(again.to_toml(), written);
        prop_assert_eq!(format!("{:?}", again.common), format!("{:?}", config.common));
    }
}
