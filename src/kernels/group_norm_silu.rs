//! `group_norm_silu`: an image normalised over groups of channels, and silu of that where it is
//! wanted, in one operation (`torch.nn.GroupNorm`, `torch.nn.SiLU`). Channels last.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::activation::{silu, silu_derivative};
use super::cpu::{Values, tensor};
use super::gpu::launch;
use super::node::{input, node, output};
use super::threads::parts;
use super::vector::vectorised;
use crate::device::gpu::{self, Gpu, Kernel, buffer, kernel, output as empty};

/// What the operation is told besides its image.
#[derive(Clone, Copy)]
pub struct GroupNorm<'a> {
    pub groups: usize,
    pub gamma: &'a [f32],
    pub beta: &'a [f32],
    pub eps: f32,
    /// Whether silu follows.
    pub silu: bool,
}

/// Pixels whose sum is f32 before it is added to one of f64.
const PIXELS: usize = 64;

/// The mean over each group of what `add` adds to a row of channels for each pixel, one a channel.
#[inline(always)]
fn group_means(
    pixels: usize,
    c: usize,
    groups: usize,
    add: impl Fn(usize, &mut [f32]),
) -> Vec<f64> {
    let (mut block, mut sums) = (vec![0f32; c], vec![0f64; groups]);
    for first in (0..pixels).step_by(PIXELS) {
        block.fill(0.0);
        (first..pixels.min(first + PIXELS)).for_each(|p| add(p, &mut block));
        for (sum, of) in sums.iter_mut().zip(block.chunks_exact(c / groups)) {
            *sum += of.iter().map(|v| f64::from(*v)).sum::<f64>();
        }
    }
    let count = (pixels * c / groups) as f64;
    sums.iter_mut().for_each(|s| *s /= count);
    sums
}

/// One number a group as one a channel.
fn spread(of_groups: &[f64], c: usize) -> Vec<f32> {
    let each = c / of_groups.len();
    of_groups.iter().flat_map(|v| std::iter::repeat_n(*v as f32, each)).collect()
}

/// Mean and 1 / deviation of each channel's group.
#[inline(always)]
fn moments(x: &[f32], c: usize, n: &GroupNorm) -> [Vec<f32>; 2] {
    let pixels = x.len() / c;
    let row = |p: usize| &x[p * c..][..c];
    let mean = group_means(pixels, c, n.groups, |p, sums| {
        sums.iter_mut().zip(row(p)).for_each(|(s, x)| *s += x);
    });
    let mean = spread(&mean, c);
    let variance = group_means(pixels, c, n.groups, |p, sums| {
        for (s, (x, m)) in sums.iter_mut().zip(row(p).iter().zip(&mean)) {
            *s += (x - m) * (x - m);
        }
    });
    let rstd: Vec<f64> = variance.iter().map(|v| 1.0 / (v + f64::from(n.eps)).sqrt()).collect();
    [mean, spread(&rstd, c)]
}

/// Images of `pixels x channels`, on the CPU.
pub fn forward(x: &[f32], pixels: usize, c: usize, n: GroupNorm) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    parts(&mut y, pixels * c, |image, y| {
        let x = &x[image * pixels * c..][..pixels * c];
        vectorised(
            #[inline(always)]
            || {
                let [mean, rstd] = moments(x, c, &n);
                let scale: Vec<f32> = rstd.iter().zip(n.gamma).map(|(r, g)| r * g).collect();
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                    let affine = mean.iter().zip(scale.iter().zip(n.beta));
                    for (y, (x, (m, (s, b)))) in y.iter_mut().zip(x.iter().zip(affine)) {
                        let z = (x - m).mul_add(*s, *b);
                        *y = if n.silu { silu(z) } else { z };
                    }
                }
            },
        );
    });
    y
}

/// The gradient of `x` on the CPU.
pub fn gradient(x: &[f32], g: &[f32], pixels: usize, c: usize, n: GroupNorm) -> Vec<f32> {
    let mut gx = vec![0.0; x.len()];
    parts(&mut gx, pixels * c, |image, gx| {
        let of = image * pixels * c..(image + 1) * pixels * c;
        let (x, g) = (&x[of.clone()], &g[of]);
        vectorised(
            #[inline(always)]
            || {
                let [mean, rstd] = moments(x, c, &n);
                let scale: Vec<f32> = rstd.iter().zip(n.gamma).map(|(r, g)| r * g).collect();
                // First the gradient of the value before silu, times gamma.
                let rows = x.chunks_exact(c).zip(g.chunks_exact(c));
                for (gx, (x, g)) in gx.chunks_exact_mut(c).zip(rows) {
                    let affine = mean.iter().zip(scale.iter().zip(n.gamma.iter().zip(n.beta)));
                    let values = x.iter().zip(g.iter().zip(affine));
                    for (gx, (x, (g, (m, (s, (gamma, beta)))))) in gx.iter_mut().zip(values) {
                        let z = (x - m).mul_add(*s, *beta);
                        let slope = if n.silu { silu_derivative(z) } else { 1.0 };
                        *gx = g * slope * gamma;
                    }
                }
                let row = |p: usize| &gx[p * c..][..c];
                let plain = group_means(pixels, c, n.groups, |p, sums| {
                    sums.iter_mut().zip(row(p)).for_each(|(s, g)| *s += g);
                });
                let along = group_means(pixels, c, n.groups, |p, sums| {
                    // Of the normalised value, which stays small where x does not.
                    let of = mean.iter().zip(&rstd);
                    let values = row(p).iter().zip(x[p * c..][..c].iter().zip(of));
                    for (s, (g, (x, (m, r)))) in sums.iter_mut().zip(values) {
                        *s += g * ((x - m) * r);
                    }
                });
                let (plain, along) = (spread(&plain, c), spread(&along, c));
                for (gx, x) in gx.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                    let of = mean.iter().zip(rstd.iter().zip(plain.iter().zip(&along)));
                    for (gx, (x, (m, (r, (plain, along))))) in gx.iter_mut().zip(x.iter().zip(of)) {
                        *gx = r * (*gx - plain - (x - m) * r * along);
                    }
                }
            },
        );
    });
    gx
}

pub(super) const FORWARD: Kernel =
    kernel!("group_norm_silu", "sigmoid", "workgroup_sum", "group_walk");
pub(super) const GRADIENT: Kernel =
    kernel!("group_norm_silu_gradient", "sigmoid", "workgroup_sum", "group_walk");

/// Kept in sync with `shaders/group_norm_silu.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Sizes {
    pixels: u32,
    channels: u32,
    groups: u32,
    silu: u32,
    eps: f32,
    pad: [u32; 3],
}

fn on_gpu(
    gpu: Gpu,
    x: Tensor<4>,
    [gamma, beta]: [Tensor<1>; 2],
    sizes: Sizes,
    parent: DispatchTensor,
) -> Tensor<4> {
    let (shape, device) = (x.dims(), x.device());
    // A group of two channels is common in small networks.
    let each = (sizes.channels / sizes.groups) as usize;
    let width = if each % 4 == 2 { 2 } else { gpu::width(each) };
    let grid = [sizes.groups, shape[0] as u32];
    let statistics = empty([shape[0], sizes.groups as usize, 2], &device);
    let y = empty(shape, &device);
    launch(
        &gpu,
        FORWARD,
        width,
        &sizes,
        &[&buffer(&x), &buffer(&gamma), &buffer(&beta), &buffer(&y), &buffer(&statistics)],
        grid,
    );
    node([parent], y, move |g: Tensor<4>, _| {
        let gx = empty(shape, &device);
        let [gamma, beta] = [buffer(&gamma), buffer(&beta)];
        launch(
            &gpu,
            GRADIENT,
            width,
            &sizes,
            &[&buffer(&x), &buffer(&g), &gamma, &beta, &buffer(&statistics), &buffer(&gx)],
            grid,
        );
        [output(gx)]
    })
}

/// `x` `[B, H, W, C]`; gamma and beta `[C]`.
pub fn group_norm_silu(
    x: Tensor<4>,
    groups: usize,
    gamma: &Tensor<1>,
    beta: &Tensor<1>,
    eps: f64,
    silu: bool,
) -> Tensor<4> {
    let (shape, parent) = (x.dims(), input(&x));
    let ([_, h, w, c], eps) = (shape, eps as f32);
    let x = x.inner();
    if let Some(gpu) = Gpu::of(&x) {
        let [pixels, channels, groups] = [h * w, c, groups].map(|n| n as u32);
        let sizes = Sizes { pixels, channels, groups, silu: silu.into(), eps, pad: [0; 3] };
        return on_gpu(gpu, x, [gamma.clone(), beta.clone()], sizes, parent);
    }
    let (x, gamma, beta) = (Values::of(&x), Values::of(gamma), Values::of(beta));
    let norm = GroupNorm { groups, gamma: &gamma, beta: &beta, eps, silu };
    let y = tensor(forward(&x, h * w, c, norm), shape);
    node([parent], y, move |g: Tensor<4>, _| {
        let norm = GroupNorm { groups, gamma: &gamma, beta: &beta, eps, silu };
        [output(tensor(gradient(&x, &Values::of(&g), h * w, c, norm), shape))]
    })
}
