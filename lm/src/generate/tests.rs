use candle_core::{DType, Device};

use super::*;
use crate::kernels::gemm::Precision;
use crate::model::{Batch, Sequence};
use crate::ops::Kernels;
use crate::testing;

fn decoder() -> Decoder {
    testing::checkpoint().frozen(&Device::Cpu, DType::F32).unwrap()
}

fn options(batch: usize) -> Options {
    Options {
        sampling: Sampling { temperature: 0.9, ..Default::default() },
        max_new_tokens: 20,
        min_new_tokens: 0,
        eos: vec![29],
        stop: vec![],
        seed: 3,
        batch,
    }
}

fn requests() -> Vec<Request> {
    let prompts = [vec![1, 2, 3], vec![28, 4], vec![9; 70]];
    let prompts: Vec<_> = prompts.into_iter().map(Arc::new).collect();
    (0..9).map(|i| Request { id: 100 + i, prompt: prompts[i as usize / 3].clone() }).collect()
}

fn run(decoder: &Decoder, requests: Vec<Request>, options: &Options) -> Vec<Completion> {
    let mut all = Vec::new();
    let mut generator = Generator::new(decoder).unwrap();
    generator.generate(requests, options, None, &|| false, &mut |c| all.push(c)).unwrap();
    all.sort_by_key(|c| c.id);
    all
}

#[test]
fn batch_size_order_and_threads_change_nothing() {
    let decoder = decoder();
    let want = run(&decoder, requests(), &options(1));
    assert!(want.iter().any(|c| c.finish == Finish::Eos) && want.iter().any(|c| c.tokens.len() > 5));
    for batch in [2, 4, 9] {
        assert_eq!(run(&decoder, requests(), &options(batch)), want, "batch of {batch}");
    }
    let mut backwards = requests();
    backwards.reverse();
    assert_eq!(run(&decoder, backwards, &options(5)), want);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| run(&decoder, requests(), &options(9))), want, "{threads} threads");
    }
}

#[test]
fn the_sampler_and_the_trainer_agree_to_the_bit() {
    for decoder in [decoder(), decoder().with_precision(Precision::Bf16)] {
        let requests = requests();
        for (c, r) in run(&decoder, requests.clone(), &options(4)).iter().zip(&requests) {
            let batch = Batch::new([Sequence { prompt: &r.prompt, completion: &c.tokens }]);
            assert_eq!(decoder.logprobs(&batch, 0.9).unwrap().to_vec1::<f32>().unwrap(), c.logprobs);
        }
    }
}

#[test]
fn the_plain_forward_pass_says_the_same() {
    let decoder = decoder();
    let want = run(&decoder, requests(), &options(4));
    let got = run(&decoder.with_kernels(Kernels::Plain), requests(), &options(4));
    for (want, got) in want.iter().zip(&got) {
        assert_eq!(want.tokens, got.tokens);
        for (a, b) in want.logprobs.iter().zip(&got.logprobs) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

#[test]
fn a_stop_text_ends_a_completion_and_is_cut_from_its_text() {
    let checkpoint = testing::checkpoint();
    let decoder = decoder();
    let free = run(&decoder, requests(), &options(9));
    let long = free.iter().find(|c| c.tokens.len() > 8).unwrap();
    let stop = vec![checkpoint.text.decode(&long.tokens[3..5]).unwrap()];
    let stopping = Options { stop: stop.clone(), ..options(9) };
    let mut all = Vec::new();
    let mut generator = Generator::new(&decoder).unwrap();
    generator.generate(requests(), &stopping, Some(&checkpoint.text), &|| false, &mut |c| all.push(c)).unwrap();
    let ended = all.iter().find(|c| c.id == long.id).unwrap();
    assert_eq!(ended.finish, Finish::Stop);
    assert!(ended.tokens.len() <= 5);
    let text = completion_text(&checkpoint.text, &ended.tokens, &stop).unwrap();
    assert!(!text.contains(&stop[0]));
}

#[test]
fn no_end_before_the_minimum() {
    let all = run(&decoder(), requests(), &Options { min_new_tokens: 20, ..options(4) });
    assert!(all.iter().all(|c| c.tokens.len() == 20 && c.finish == Finish::Length));
}

#[test]
fn bad_requests_are_refused_with_their_id() {
    let decoder = decoder();
    let refuse = |prompt: Vec<u32>| {
        let request = Request { id: 7, prompt: Arc::new(prompt) };
        let mut generator = Generator::new(&decoder).unwrap();
        generator.generate(vec![request], &options(1), None, &|| false, &mut |_| {}).unwrap_err().to_string()
    };
    assert!(refuse(vec![]).contains("rollout 7"));
    assert!(refuse(vec![1; 90]).contains("context of 96"));
    assert!(refuse(vec![1000]).contains("1000"));
}

#[test]
fn cancelling_ends_the_call() {
    let mut generator = Generator::new(&decoder()).unwrap();
    let result = generator.generate(requests(), &options(2), None, &|| true, &mut |_| {});
    assert!(matches!(result, Err(Error::Cancelled)));
}
