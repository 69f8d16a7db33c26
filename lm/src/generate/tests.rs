use candle_core::{DType, Device};
use rehearsal_kernels::gemm::Precision;

use super::*;
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
fn the_plain_forward_pass_agrees() {
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
fn a_stop_string_ends_a_completion_and_is_cut_from_its_text() {
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
fn no_completion_ends_before_the_minimum() {
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

/// Log-probabilities, and the gradient of a weighted sum of them for every parameter.
fn backward(forward: crate::Forward<'_>, decoder: &Decoder) -> (Vec<f32>, Vec<Vec<f32>>) {
    let output = forward.output();
    let logprobs: Vec<f32> = output.to_vec1().unwrap();
    let weights: Vec<f32> = (0..logprobs.len()).map(|i| (i % 7) as f32 - 2.3).collect();
    let mut gradients = crate::Gradients::default();
    forward.backward(&candle_core::Tensor::new(weights, &Device::Cpu).unwrap(), &mut gradients).unwrap();
    let flat = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
    (logprobs, gradients.complete(decoder).unwrap().into_values().map(flat).collect())
}

#[test]
fn recorded_activations_equal_those_of_a_forward_pass() {
    for precision in [Precision::F32, Precision::Bf16] {
        let decoder = testing::checkpoint().trainable(&Device::Cpu, DType::F32).unwrap().with_precision(precision);
        // More prompt tokens than one prefill pass takes, two completions per prompt.
        let prompts: Vec<_> = (0..9).map(|p| Arc::new((0..70).map(|i| (i * 5 + p) % 27).collect::<Vec<_>>())).collect();
        let request = |i: usize| Request { id: 7 + i as u64, prompt: prompts[i / 2].clone() };
        let requests: Vec<Request> = (0..18).map(request).collect();
        for slots in [1, 5, 18] {
            let (mut all, mut generator) = (Vec::new(), Generator::new(&decoder).unwrap());
            let recorded = generator
                .generate_recorded(requests.clone(), &options(slots), None, &|| false, &mut |c| all.push(c), 2000)
                .unwrap()
                .unwrap();
            all.sort_by_key(|c| c.id);
            let sequence = |i: usize| Sequence { prompt: &prompts[i / 2], completion: &all[i].tokens };
            // All sequences; then some in another order, where no prompt is shared.
            for order in [(0..18).collect::<Vec<_>>(), vec![7, 3, 16, 2]] {
                let batch = Batch::new(order.iter().map(|&i| sequence(i)));
                let want = backward(decoder.forward(&batch, 0.9).unwrap(), &decoder);
                let got = backward(decoder.forward_recalled(&batch, 0.9, recorded.clone()).unwrap(), &decoder);
                assert!(recorded.covers(&batch, 0.9) && got == want, "{precision:?}, {slots} slots");
                let asked = batch.with_entropy();
                let want = backward(decoder.forward(&asked, 0.9).unwrap(), &decoder);
                assert_eq!(backward(decoder.forward_recalled(&asked, 0.9, recorded.clone()).unwrap(), &decoder), want);
            }
            assert_eq!(recorded.logprobs(&prompts[2], &all[5].tokens, 0.9).unwrap(), all[5].logprobs);
        }
    }
}

#[test]
fn a_batch_that_was_not_recorded_is_computed() {
    let decoder = testing::checkpoint().trainable(&Device::Cpu, DType::F32).unwrap();
    let record = |decoder: &Decoder, tokens: usize| {
        let mut all = Vec::new();
        let mut generator = Generator::new(decoder).unwrap();
        let kept = generator
            .generate_recorded(requests(), &options(4), None, &|| false, &mut |c| all.push(c), tokens)
            .unwrap();
        all.sort_by_key(|c| c.id);
        (kept, all)
    };
    let (kept, all) = record(&decoder, 1000);
    let kept = kept.unwrap();
    let requests = requests();
    let of = |i: usize| Sequence { prompt: &requests[i].prompt, completion: &all[i].tokens };
    let strange = Batch::new([of(0), Sequence { prompt: &[1, 2], completion: &[3, 4] }]);
    let cut = Batch::new([Sequence { completion: &all[0].tokens[..1], ..of(0) }]);
    for (batch, temperature) in [(&Batch::new([of(0)]), 1.0), (&strange, 0.9), (&cut, 0.9)] {
        assert!(!kept.covers(batch, temperature));
        let want = backward(decoder.forward(batch, temperature).unwrap(), &decoder);
        let got = backward(decoder.forward_recalled(batch, temperature, kept.clone()).unwrap(), &decoder);
        assert_eq!(got, want);
    }
    assert!(kept.logprobs(&requests[0].prompt, &all[0].tokens, 1.0).is_none());
    // More rows than the limit; passes that cannot be recorded.
    assert!(record(&decoder, 100).0.is_none());
    assert!(record(&decoder.with_gradient_checkpointing(true), 1000).0.is_none());
    assert!(record(&testing::checkpoint().frozen(&Device::Cpu, DType::F32).unwrap(), 1000).0.is_none());
}
