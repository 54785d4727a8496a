//! `ddim_step`: guidance, DDIM mean, noise, x_prev and log-probability in one pass over the latent.
//!
//! ```text
//! p      = u + g (c - u)                                    prediction after guidance
//! mean   = a x - b p   (+ sqrt(abar_prev) (clip(x0) - x0) where the scheduler clips samples)
//! x_prev = mean + sigma z,   z = philox(seed, image, step, element)
//! log p  = -mean(z^2) / 2 - log sigma - log sqrt(2 pi)      a mean over the D = C H W dimensions
//! ```
//! Source: Song et al. 2021, eq. 12; Lee & Ye 2026, section 3. Shapes: x `[B, C, H, W]`, network output `[B or 2B, ..]`.
//! Accuracy: within 1e-5 of f64, relative to the larger of 1 and the value. No gradient: sampling is not differentiated.

use burn::tensor::{Tensor, TensorData};

use super::gpu::{Kernel, Launch, buffer, kernel, output, width};
use super::{BLOCK, Coefficients, Guidance, NoiseKey, Params};
use crate::device::Compute;

pub(super) const STEP: Kernel = kernel!("ddim_step", "common", "philox");
pub(super) const LOG_PROB: Kernel = kernel!("ddim_log_prob", "common");

/// What a step leaves behind.
pub struct DdimStep {
    /// The latent after the step, `[B, C, H, W]`.
    pub x_prev: Tensor<4>,
    /// The prediction after guidance, `[B, C, H, W]`: the old policy of the update.
    pub prediction: Tensor<4>,
    /// Log-probability of each sample's step, `[B]`; 0 where sigma is 0.
    pub log_prob: Tensor<1>,
}

/// One step for a batch. `model_out` holds the unconditional rows first where guidance is on.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub fn ddim_step(
    compute: &Compute,
    x: &Tensor<4>,
    model_out: &Tensor<4>,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> DdimStep {
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
        return DdimStep { x_prev: tensor(x_prev), prediction: tensor(prediction), log_prob };
    };
    let params = Params::new(batch, dim, guidance, c, key);
    let (x_prev, prediction) = (output(shape, &compute.burn), output(shape, &compute.burn));
    let log_prob = output([batch], &compute.burn);
    let partials = buffer(&output([batch, dim.div_ceil(BLOCK), 2], &compute.burn));
    let uniforms = bytemuck::bytes_of(&params);
    gpu.run(&[
        Launch {
            kernel: STEP,
            width: width(dim),
            uniforms,
            bindings: vec![&buffer(x), &buffer(model_out), &buffer(&x_prev), &buffer(&prediction), &partials],
            grid: [params.blocks, params.batch],
        },
        Launch {
            kernel: LOG_PROB,
            width: width(dim),
            uniforms,
            bindings: vec![&partials, &buffer(&log_prob)],
            grid: [params.batch.div_ceil(256), 1],
        },
    ]);
    DdimStep { x_prev, prediction, log_prob }
}

/// CPU reference: (x_prev `[B, D]`, prediction `[B, D]`, log p `[B]`).
pub fn reference(
    x: &[f32],
    model_out: &[f32],
    batch: usize,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
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
        let mut mean = c.a * x[i] - c.b * p;
        if c.clip < 1e30 {
            let x0 = c.x0_x * x[i] - c.x0_p * p;
            mean += c.root_prev * (x0.clamp(-c.clip, c.clip) - x0);
        }
        prediction.push(p);
        x_prev.push(mean + c.sigma * noise[i]);
    }
    let log_prob = noise.chunks(dim).map(|z| {
        let squares: f64 = z.iter().map(|z| f64::from(z * z)).sum();
        (-0.5 * squares / dim as f64 - f64::from(c.log_norm)) as f32
    });
    (x_prev, prediction, log_prob.collect())
}
