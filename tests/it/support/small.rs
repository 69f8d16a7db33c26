//! Small models with random weights.

use candle_core::{Device, Tensor};
use rehearsal::lm::random::Stream;
use rehearsal::lm::{Architecture, Parameters};

/// An architecture's weights from a seed: norms about one, all else about zero.
pub fn weights(architecture: &Architecture, seed: u64) -> Parameters {
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let (stream, n) = (Stream::new(seed, i as u64), shape.iter().product::<usize>());
        let centre = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let data: Vec<f32> = (0..n as u64).map(|j| centre + 0.3 * stream.normal(j) as f32).collect();
        (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap())
    };
    architecture.parameters().into_iter().enumerate().map(tensor).collect()
}
