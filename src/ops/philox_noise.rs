//! `philox_noise`: standard normal noise as a tensor, from the counter-based generator of
//! [`crate::philox`].
//!
//! Shape `[batch, C, H, W]`; every normal is within 2e-6 of the f64 formula; a device repeats its
//! own bits.

use burn::tensor::Tensor;

use super::context::{Coefficients, Guidance, NoiseKey, Params, StepContext};
use crate::device::compute::Compute;
use crate::device::gpu::{Kernel, Launch, buffer, kernel, output, width};
use crate::device::tensor::upload;
use crate::philox::{self, Stream};

pub(super) const NOISE: Kernel = kernel!("philox_noise", "common", "philox");

/// The noise that `ddim_step`, `log_ratio` and `policy_objective` draw for a batch at a step.
pub fn philox_noise(compute: &Compute, shape: [usize; 4], key: NoiseKey) -> Tensor<4> {
    let (batch, dim) = (shape[0], shape[1..].iter().product::<usize>());
    let Some(gpu) = &compute.gpu else {
        return upload(&reference(batch, dim, key), shape, &compute.burn);
    };
    let noise = output(shape, &compute.burn);
    let (guidance, coefficients) = (Guidance::Off, Coefficients::default());
    let params = Params::new(batch, dim, &StepContext { compute, guidance, coefficients, key });
    let out = buffer(&noise);
    let launch =
        Launch { kernel: NOISE, bindings: vec![&out], grid: [params.blocks, params.batch] };
    gpu.run(bytemuck::bytes_of(&params), width(dim), &[launch]);
    noise
}

/// CPU reference: `[batch, dim]`.
pub fn reference(batch: usize, dim: usize, key: NoiseKey) -> Vec<f32> {
    (0..batch as u32)
        .flat_map(|i| {
            philox::noise(key.seed, Stream::StepNoise, key.first_image + i, key.step, dim)
        })
        .collect()
}
