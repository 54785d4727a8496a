//! What `ddim_step` and `flow_step` share: guidance, a mean that is the sampler's own, noise,
//! x_prev and the log-probability in one pass over the latent.
//!
//! ```text
//! p      = u + g (c - u)                                    prediction after guidance
//! x_prev = mean(x, p) + sigma z,   z = philox(seed, image, step, element)
//! log p  = -mean(z^2) / 2 - log sigma - log sqrt(2 pi)      a mean over the D = C H W dimensions
//! ```
//! Shapes: x `[B, C, H, W]`, network output `[B or 2B, ..]`. Accuracy: within 1e-5 of f64, relative
//! to the larger of 1 and the value. No gradient: sampling is not differentiated.

use burn::tensor::Tensor;

use super::context::{Params, StepContext};
use crate::device::gpu::{Kernel, Launch, buffer, kernel, output, width};
use crate::device::tensor::{host, upload};

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

/// The same on the host.
pub struct SteppedHost {
    /// `[B, D]`
    pub x_prev: Vec<f32>,
    /// `[B, D]`
    pub prediction: Vec<f32>,
    /// `[B]`
    pub log_prob: Vec<f32>,
}

/// A CPU reference: (context, x, network output, batch).
pub(super) type Reference = fn(&StepContext, &[f32], &[f32], usize) -> SteppedHost;

/// One step for a batch, by a kernel or on the CPU by its reference; `model_out` holds the
/// unconditional rows first where guidance is on.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub(super) fn run(
    kernel: Kernel,
    reference: Reference,
    s: &StepContext,
    x: &Tensor<4>,
    model_out: &Tensor<4>,
) -> Stepped {
    let shape = x.dims();
    let (batch, dim) = (shape[0], shape[1..].iter().product::<usize>());
    let expected = [batch * s.guidance.rows(), shape[1], shape[2], shape[3]];
    assert_eq!(model_out.dims(), expected, "network output against latents");
    let device = &s.compute.burn;
    let Some(gpu) = &s.compute.gpu else {
        let done = reference(s, &host(x), &host(model_out), batch);
        return Stepped {
            x_prev: upload(&done.x_prev, shape, device),
            prediction: upload(&done.prediction, shape, device),
            log_prob: upload(&done.log_prob, [batch], device),
        };
    };
    let params = Params::new(batch, dim, s);
    let (x_prev, prediction) = (output(shape, device), output(shape, device));
    let log_prob = output([batch], device);
    let x = buffer(x);
    let sums = params.partials(&x);
    let (out, next, p) = (buffer(model_out), buffer(&x_prev), buffer(&prediction));
    let step = Launch {
        kernel,
        bindings: vec![&x, &out, &next, &p, &sums],
        grid: [params.blocks, params.batch],
    };
    let rows = buffer(&log_prob);
    let finish = Launch { kernel: LOG_PROB, bindings: vec![&sums, &rows], grid: [params.batch, 1] };
    gpu.run(bytemuck::bytes_of(&params), width(dim), &[step, finish]);
    Stepped { x_prev, prediction, log_prob }
}

/// The CPU reference with `mean` of (x, prediction).
pub(super) fn reference(
    s: &StepContext,
    x: &[f32],
    model_out: &[f32],
    batch: usize,
    mean: impl Fn(f32, f32) -> f32,
) -> SteppedHost {
    let (dim, c) = (x.len() / batch, &s.coefficients);
    let noise = if c.sigma > 0.0 {
        super::philox_noise::reference(batch, dim, s.key)
    } else {
        vec![0.0; x.len()]
    };
    let conditional = &model_out[(s.guidance.rows() - 1) * x.len()..];
    let (mut x_prev, mut prediction) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len()));
    for i in 0..x.len() {
        let p = s.guidance.combine(model_out[i], conditional[i]);
        prediction.push(p);
        x_prev.push(mean(x[i], p) + c.sigma * noise[i]);
    }
    let log_prob = noise.chunks(dim).map(|z| {
        let squares: f64 = z.iter().map(|z| f64::from(z * z)).sum();
        (-0.5 * squares / dim as f64 - f64::from(c.log_norm)) as f32
    });
    let log_prob = log_prob.collect();
    SteppedHost { x_prev, prediction, log_prob }
}
