//! What `ddim_step` and `flow_step` share: guidance, a mean that is the sampler's own, noise, x_prev and the
//! log-probability in one pass over the latent.
//!
//! ```text
//! p      = u + g (c - u)                                    prediction after guidance
//! x_prev = mean(x, p) + sigma z,   z = philox(seed, image, step, element)
//! log p  = -mean(z^2) / 2 - log sigma - log sqrt(2 pi)      a mean over the D = C H W dimensions
//! ```
//! Shapes: x `[B, C, H, W]`, network output `[B or 2B, ..]`. Accuracy: within 1e-5 of f64, relative to the larger of 1
//! and the value. No gradient: sampling is not differentiated.

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};

use super::ddim_step::ddim_step;
use super::flow_step::flow_step;
use super::gpu::{Kernel, Launch, buffer, kernel, output, width};
use super::{Coefficients, Guidance, NoiseKey, Params};
use crate::device::Compute;

pub(super) const LOG_PROB: Kernel = kernel!("step_log_prob", "common", "partials_sum");

/// What a step leaves behind.
pub struct Stepped {
    /// The latent after the step, `[B, C, H, W]`.
    pub x_prev: Tensor<4>,
    /// The prediction after guidance, `[B, C, H, W]`: the old policy of the update.
    pub prediction: Tensor<4>,
    /// Log-probability of each sample's step, `[B]`; 0 where sigma is 0.
    pub log_prob: Tensor<1>,
}

/// The step of the family that the coefficients belong to.
///
/// # Errors
/// When the device failed.
pub fn sampler_step(
    compute: &Compute,
    x: &Tensor<4>,
    model_out: &Tensor<4>,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Result<Stepped> {
    let step = if c.flow { flow_step } else { ddim_step };
    step(compute, x, model_out, guidance, c, key)
}

/// A family's CPU reference: (x, network output, batch, guidance, coefficients, key) to (x_prev, prediction, log p).
pub(super) type Reference =
    fn(&[f32], &[f32], usize, Guidance, &Coefficients, NoiseKey) -> (Vec<f32>, Vec<f32>, Vec<f32>);

/// One step for a batch, by a family's kernel or on the CPU its reference; `model_out` holds the unconditional rows first where guidance is on.
///
/// # Errors
/// When the device failed.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub(super) fn run(
    (kernel, reference): (Kernel, Reference),
    compute: &Compute,
    x: &Tensor<4>,
    model_out: &Tensor<4>,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Result<Stepped> {
    let shape = x.dims();
    let (batch, dim) = (shape[0], shape[1..].iter().product::<usize>());
    assert_eq!(
        model_out.dims(),
        [batch * guidance.rows(), shape[1], shape[2], shape[3]],
        "network output against latents"
    );
    let Some(gpu) = &compute.gpu else {
        let (x, out) = (super::host(x), super::host(model_out));
        let (x_prev, prediction, log_prob) = reference(&x, &out, batch, guidance, c, key);
        let tensor = |v: Vec<f32>| Tensor::from_data(TensorData::new(v, shape), &compute.burn);
        let log_prob = Tensor::from_data(TensorData::new(log_prob, [batch]), &compute.burn);
        return Ok(Stepped { x_prev: tensor(x_prev), prediction: tensor(prediction), log_prob });
    };
    let params = Params::new(batch, dim, guidance, c, key);
    let (x_prev, prediction) = (output(shape, &compute.burn), output(shape, &compute.burn));
    let log_prob = output([batch], &compute.burn);
    let x = buffer(x);
    let partials = x.partials(&params);
    gpu.run(
        bytemuck::bytes_of(&params),
        width(dim),
        &[
            Launch {
                kernel,
                bindings: vec![&x, &buffer(model_out), &buffer(&x_prev), &buffer(&prediction), &partials],
                grid: [params.blocks, params.batch],
            },
            Launch { kernel: LOG_PROB, bindings: vec![&partials, &buffer(&log_prob)], grid: [params.batch, 1] },
        ],
    )?;
    Ok(Stepped { x_prev, prediction, log_prob })
}

/// (x_prev `[B, D]`, prediction `[B, D]`, log p `[B]`) with `mean` of (x, prediction).
pub(super) fn reference(
    x: &[f32],
    model_out: &[f32],
    batch: usize,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
    mean: impl Fn(f32, f32) -> f32,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let dim = x.len() / batch;
    let noise = match c.sigma > 0.0 {
        true => super::philox::reference(batch, dim, key),
        false => vec![0.0; x.len()],
    };
    let conditional = &model_out[(guidance.rows() - 1) * x.len()..];
    let (mut x_prev, mut prediction) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len()));
    for i in 0..x.len() {
        let p = guidance.combine(model_out[i], conditional[i]);
        prediction.push(p);
        x_prev.push(mean(x[i], p) + c.sigma * noise[i]);
    }
    let log_prob = noise.chunks(dim).map(|z| {
        let squares: f64 = z.iter().map(|z| f64::from(z * z)).sum();
        (-0.5 * squares / dim as f64 - f64::from(c.log_norm)) as f32
    });
    (x_prev, prediction, log_prob.collect())
}
