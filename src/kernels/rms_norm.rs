//! `rms_norm`: a row over the root of its mean square, times gamma (`torch.nn.RMSNorm`). One gamma
//! for all rows, or one for each image where a modulation is folded into it.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;

use super::cpu::{Values, tensor};
use super::gpu::{grid, launch};
use super::layer_norm::{GROUP, ROWS, Sizes, sum};
use super::node::{input, node, output};
use super::threads::parts;
use super::vector::vectorised;
use crate::device::gpu::{self, Gpu, Kernel, buffer, kernel, output as empty};

/// What rows are scaled by: row i takes gamma `i / each`.
#[derive(Clone, Copy)]
struct Scale<'a> {
    gamma: &'a [f32],
    each: usize,
    eps: f32,
}

/// 1 / root of the mean square of a row.
#[inline(always)]
fn reciprocal(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// Rows of `width`, on the CPU.
fn forward(x: &[f32], width: usize, s: Scale) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    parts(&mut y, ROWS * width, |part, y| {
        let x = &x[part * ROWS * width..];
        vectorised(
            #[inline(always)]
            || {
                for (i, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate()
                {
                    let gamma = &s.gamma[(part * ROWS + i) / s.each * width..][..width];
                    let r = reciprocal(x, s.eps);
                    for (y, (x, gamma)) in y.iter_mut().zip(x.iter().zip(gamma)) {
                        *y = x * r * gamma;
                    }
                }
            },
        );
    });
    y
}

/// The gradient of `x` on the CPU.
fn gradient(x: &[f32], g: &[f32], width: usize, s: Scale) -> Vec<f32> {
    let mut gx = vec![0.0; x.len()];
    parts(&mut gx, ROWS * width, |part, gx| {
        let (x, g) = (&x[part * ROWS * width..], &g[part * ROWS * width..]);
        vectorised(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
                for (i, (gx, (x, g))) in gx.chunks_exact_mut(width).zip(rows).enumerate() {
                    let gamma = &s.gamma[(part * ROWS + i) / s.each * width..][..width];
                    let r = reciprocal(x, s.eps);
                    let along = sum(width, |i| g[i] * gamma[i] * (x[i] * r)) / width as f32;
                    for (y, (x, (g, gamma))) in gx.iter_mut().zip(x.iter().zip(g.iter().zip(gamma)))
                    {
                        *y = r * (g * gamma - x * r * along);
                    }
                }
            },
        );
    });
    gx
}

pub(super) const FORWARD: Kernel = kernel!("rms_norm", "run_sum");
pub(super) const GRADIENT: Kernel = kernel!("rms_norm_gradient", "run_sum");

fn on_gpu(
    gpu: Gpu,
    x: Tensor<3>,
    gamma: Tensor<2>,
    sizes: Sizes,
    parent: DispatchTensor,
) -> Tensor<3> {
    let (shape, device) = (x.dims(), x.device());
    let (rows, width) = (shape[0] * shape[1], gpu::width(shape[2]));
    let (y, reciprocals) = (empty(shape, &device), empty([rows, 1], &device));
    launch(
        &gpu,
        FORWARD,
        width,
        &sizes,
        &[&buffer(&x), &buffer(&gamma), &buffer(&y), &buffer(&reciprocals)],
        grid(rows.div_ceil(GROUP)),
    );
    node([parent], y, move |g: Tensor<3>, _| {
        let gx = empty(shape, &device);
        launch(
            &gpu,
            GRADIENT,
            width,
            &sizes,
            &[&buffer(&x), &buffer(&g), &buffer(&gamma), &buffer(&reciprocals), &buffer(&gx)],
            grid(rows.div_ceil(GROUP)),
        );
        [output(gx)]
    })
}

/// `x` `[B, T, W]`; gamma `[1 or B, W]`, constant.
pub fn rms_norm(x: Tensor<3>, gamma: Tensor<2>, eps: f64) -> Tensor<3> {
    let (shape, parent) = (x.dims(), input(&x));
    let [b, t, width] = shape;
    let each = if gamma.dims()[0] == 1 { b * t } else { t };
    let (x, gamma, eps) = (x.inner(), gamma.inner(), eps as f32);
    if let Some(gpu) = Gpu::of(&x) {
        let [rows, w, rows_per_gamma] = [b * t, width, each].map(|n| n as u32);
        let sizes = Sizes { rows, width: w, rows_per_gamma, eps };
        return on_gpu(gpu, x, gamma, sizes, parent);
    }
    let [x, gamma] = [Values::of(&x), Values::of(&gamma)];
    let y = tensor(forward(&x, width, Scale { gamma: &gamma, each, eps }), shape);
    node([parent], y, move |g: Tensor<3>, _| {
        let scale = Scale { gamma: &gamma, each, eps };
        [output(tensor(gradient(&x, &Values::of(&g), width, scale), shape))]
    })
}
