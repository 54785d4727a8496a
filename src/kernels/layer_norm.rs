//! `layer_norm`: a row less its mean, over its deviation, times gamma plus beta. One gamma and beta
//! for all rows is `torch.nn.LayerNorm`; one for each image is a modulation by time and text.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::cpu::{Values, tensor};
use super::gpu::{grid, launch};
use super::node::{input, node, output};
use super::threads::parts;
use super::vector::vectorised;
use crate::device::gpu::{self, Gpu, Kernel, buffer, kernel, output as empty};

/// What rows are scaled and shifted by: row i takes gamma and beta `i / each`.
#[derive(Clone, Copy)]
pub struct Affine<'a> {
    pub gamma: &'a [f32],
    pub beta: &'a [f32],
    pub each: usize,
    pub eps: f32,
}

/// Sums of `f` over a row, in sixteen lanes.
#[inline(always)]
pub(super) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let whole = n - n % LANES;
    for i in (0..whole).step_by(LANES) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    let rest: f32 = (whole..n).map(f).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Mean and 1 / deviation of a row.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> [f32; 2] {
    let n = x.len() as f32;
    let mean = sum(x.len(), |i| x[i]) / n;
    let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    [mean, 1.0 / (variance + eps).sqrt()]
}

/// Rows of one part of the work.
pub(super) const ROWS: usize = 16;

/// Rows of `width`, on the CPU.
pub fn forward(x: &[f32], width: usize, a: Affine) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    parts(&mut y, ROWS * width, |part, y| {
        let x = &x[part * ROWS * width..];
        vectorised(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for (i, (y, x)) in rows.enumerate() {
                    let of = (part * ROWS + i) / a.each * width;
                    let (gamma, beta) = (&a.gamma[of..of + width], &a.beta[of..of + width]);
                    let [mean, rstd] = moments(x, a.eps);
                    for (y, (x, (g, b))) in y.iter_mut().zip(x.iter().zip(gamma.iter().zip(beta))) {
                        *y = ((x - mean) * rstd).mul_add(*g, *b);
                    }
                }
            },
        );
    });
    y
}

/// The gradient of `x` on the CPU.
pub fn gradient(x: &[f32], g: &[f32], width: usize, a: Affine) -> Vec<f32> {
    let mut gx = vec![0.0; x.len()];
    parts(&mut gx, ROWS * width, |part, gx| {
        let (x, g) = (&x[part * ROWS * width..], &g[part * ROWS * width..]);
        vectorised(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
                for (i, (gx, (x, g))) in gx.chunks_exact_mut(width).zip(rows).enumerate() {
                    let of = (part * ROWS + i) / a.each * width;
                    let gamma = &a.gamma[of..of + width];
                    let [mean, rstd] = moments(x, a.eps);
                    let n = width as f32;
                    let plain = sum(width, |i| g[i] * gamma[i]) / n;
                    let along = sum(width, |i| g[i] * gamma[i] * ((x[i] - mean) * rstd)) / n;
                    for (y, (x, (g, gamma))) in gx.iter_mut().zip(x.iter().zip(g.iter().zip(gamma)))
                    {
                        *y = rstd * (g * gamma - plain - (x - mean) * rstd * along);
                    }
                }
            },
        );
    });
    gx
}

pub(super) const FORWARD: Kernel = kernel!("layer_norm", "run_sum");
pub(super) const GRADIENT: Kernel = kernel!("layer_norm_gradient", "run_sum");

/// What norms of rows are told. Kept in sync with `shaders/layer_norm.wgsl` and
/// `shaders/rms_norm.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Sizes {
    pub rows: u32,
    pub width: u32,
    pub rows_per_gamma: u32,
    pub eps: f32,
}

/// Rows of a workgroup.
pub(super) const GROUP: usize = 8;

fn on_gpu(
    gpu: Gpu,
    x: Tensor<3>,
    [gamma, beta]: [Tensor<2>; 2],
    sizes: Sizes,
    parent: DispatchTensor,
) -> Tensor<3> {
    let (shape, device) = (x.dims(), x.device());
    let (rows, width) = (shape[0] * shape[1], gpu::width(shape[2]));
    let (y, statistics) = (empty(shape, &device), empty([rows, 2], &device));
    launch(
        &gpu,
        FORWARD,
        width,
        &sizes,
        &[&buffer(&x), &buffer(&gamma), &buffer(&beta), &buffer(&y), &buffer(&statistics)],
        grid(rows.div_ceil(GROUP)),
    );
    node([parent], y, move |g: Tensor<3>, _| {
        let gx = empty(shape, &device);
        launch(
            &gpu,
            GRADIENT,
            width,
            &sizes,
            &[&buffer(&x), &buffer(&g), &buffer(&gamma), &buffer(&statistics), &buffer(&gx)],
            grid(rows.div_ceil(GROUP)),
        );
        [output(gx)]
    })
}

/// `x` `[B, T, W]`; gamma and beta `[1 or B, W]`, constants.
pub fn layer_norm(x: Tensor<3>, gamma: Tensor<2>, beta: Tensor<2>, eps: f64) -> Tensor<3> {
    let (shape, parent) = (x.dims(), input(&x));
    let [b, t, width] = shape;
    let each = if gamma.dims()[0] == 1 { b * t } else { t };
    let (x, gamma, beta, eps) = (x.inner(), gamma.inner(), beta.inner(), eps as f32);
    if let Some(gpu) = Gpu::of(&x) {
        let [rows, w, rows_per_gamma] = [b * t, width, each].map(|n| n as u32);
        let sizes = Sizes { rows, width: w, rows_per_gamma, eps };
        return on_gpu(gpu, x, [gamma, beta], sizes, parent);
    }
    let [x, gamma, beta] = [Values::of(&x), Values::of(&gamma), Values::of(&beta)];
    let affine = Affine { gamma: &gamma, beta: &beta, each, eps };
    let y = tensor(forward(&x, width, affine), shape);
    node([parent], y, move |g: Tensor<3>, _| {
        let affine = Affine { gamma: &gamma, beta: &beta, each, eps };
        [output(tensor(gradient(&x, &Values::of(&g), width, affine), shape))]
    })
}
