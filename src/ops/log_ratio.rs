//! `log_ratio`: the exact log-probability ratio of a step under the policy now and when it sampled.
//!
//! ```text
//! log rho = -mean(w D z + q w^2 D^2 / 2),   D = p_theta - p_old         Lee & Ye 2026, proposition 1; q = 1
//! KL      = mean(w_native^2 (p_theta - p_ref)^2) / 2                     to the reference policy, where there is one
//! ```
//! q = 0 and w = b is GRPO-Guard's normalised ratio (Wang et al. 2025): no drift of the mean, one spread at all steps.
//! The form keeps its relative accuracy as D goes to 0, where exp(log p - log p_old) - 1 has lost all of it.
//! Accuracy: 1e-5 of the mean magnitude of the terms. Its gradient is part of [`super::policy_objective`].

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};

use super::gpu::{Buffer, Kernel, Launch, buffer, kernel, output, width};
use super::{Coefficients, Guidance, NoiseKey, Params};
use crate::device::Compute;

pub(super) const PARTIALS: Kernel = kernel!("log_ratio", "common", "philox");
pub(super) const FINISH: Kernel = kernel!("log_ratio_finish", "common", "partials_sum");

/// `[B, 2]`: log rho and KL of each sample. `model_out` and `reference_out` are `[B or 2B, C, H, W]`, `old` is
/// the prediction after guidance, `[B, C, H, W]`. Without a reference the KL is 0.
///
/// # Errors
/// When the device failed.
pub fn log_ratio(
    compute: &Compute,
    model_out: &Tensor<4>,
    old: &Tensor<4>,
    reference_out: Option<&Tensor<4>>,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Result<Tensor<2>> {
    let shape = old.dims();
    let (batch, dim) = (shape[0], shape[1..].iter().product::<usize>());
    let Some(gpu) = &compute.gpu else {
        let reference_out = reference_out.map(super::host);
        let rows =
            reference(&super::host(model_out), &super::host(old), reference_out.as_deref(), batch, guidance, c, key);
        return Ok(Tensor::from_data(TensorData::new(rows.concat(), [batch, 2]), &compute.burn));
    };
    let params = Params { with_reference: reference_out.is_some().into(), ..Params::new(batch, dim, guidance, c, key) };
    let log_rho = output([batch, 2], &compute.burn);
    let (policy, old, rows) = (buffer(model_out), buffer(old), buffer(&log_rho));
    let partials = policy.partials(&params);
    let frozen = reference_out.map(buffer);
    let launches = launches(&params, [&policy, &old, frozen.as_ref().unwrap_or(&policy), &partials, &old], &rows);
    gpu.run(bytemuck::bytes_of(&params), width(dim), &launches)?;
    Ok(log_rho)
}

/// The two launches of the operation: `inputs` are the network's output, the old prediction, the reference's output,
/// the partial sums and the direction (any buffer where `with_direction` is 0).
pub(super) fn launches<'a>(params: &Params, inputs: [&'a Buffer; 5], log_rho: &'a Buffer) -> [Launch<'a>; 2] {
    [
        Launch { kernel: PARTIALS, bindings: inputs.to_vec(), grid: [params.blocks, params.batch] },
        Launch { kernel: FINISH, bindings: vec![inputs[3], log_rho], grid: [params.batch, 1] },
    ]
}

/// CPU reference: `[log rho, KL]` of each sample, summed in f64.
pub fn reference(
    model_out: &[f32],
    old: &[f32],
    reference_out: Option<&[f32]>,
    batch: usize,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Vec<[f32; 2]> {
    let (n, dim) = (old.len(), old.len() / batch);
    let noise = super::philox::reference(batch, dim, key);
    let second = (guidance.rows() - 1) * n;
    (0..batch)
        .map(|sample| {
            let (mut ratio, mut kl) = (0f64, 0f64);
            for i in sample * dim..(sample + 1) * dim {
                let p = guidance.combine(model_out[i], model_out[i + second]);
                let wd = c.w * (p - old[i]);
                ratio += f64::from(wd * (noise[i] + 0.5 * c.quadratic * wd));
                if let Some(r) = reference_out {
                    let wr = c.w_native * (p - guidance.combine(r[i], r[i + second]));
                    kl += f64::from(0.5 * wr * wr);
                }
            }
            [(-ratio / dim as f64) as f32, (kl / dim as f64) as f32]
        })
        .collect()
}
