//! `geglu`: the first half of a row times gelu of the second (Shazeer 2020), by erf.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;

use super::activation::{GROUP, gelu, gelu_derivative};
use super::cpu::{Values, tensor};
use super::gpu::{grid, launch};
use super::node::{input, node, output};
use super::threads::parts;
use super::vector::vectorised;
use crate::device::gpu::{self, Gpu, Kernel, buffer, kernel, output as empty};

/// Rows of one part of the work.
const ROWS: usize = 16;

/// `h` `[rows, 2 inner] -> [rows, inner]`, on the CPU.
pub fn forward(h: &[f32], inner: usize) -> Vec<f32> {
    let mut y = vec![0.0; h.len() / 2];
    parts(&mut y, ROWS * inner, |i, y| {
        let h = &h[2 * i * ROWS * inner..];
        vectorised(
            #[inline(always)]
            || {
                for (y, h) in y.chunks_exact_mut(inner).zip(h.chunks_exact(2 * inner)) {
                    let (value, gate) = h.split_at(inner);
                    y.iter_mut()
                        .zip(value.iter().zip(gate))
                        .for_each(|(y, (v, g))| *y = v * gelu(*g));
                }
            },
        );
    });
    y
}

/// The gradient of `h` on the CPU.
pub fn gradient(h: &[f32], g: &[f32], inner: usize) -> Vec<f32> {
    let mut gh = vec![0.0; h.len()];
    parts(&mut gh, 2 * ROWS * inner, |i, gh| {
        let (h, g) = (&h[2 * i * ROWS * inner..], &g[i * ROWS * inner..]);
        vectorised(
            #[inline(always)]
            || {
                let rows = h.chunks_exact(2 * inner).zip(g.chunks_exact(inner));
                for (gh, (h, g)) in gh.chunks_exact_mut(2 * inner).zip(rows) {
                    let (value, gate) = h.split_at(inner);
                    let (gv, gg) = gh.split_at_mut(inner);
                    gv.iter_mut().zip(gate.iter().zip(g)).for_each(|(y, (x, g))| *y = g * gelu(*x));
                    for (y, (v, (x, g))) in gg.iter_mut().zip(value.iter().zip(gate.iter().zip(g)))
                    {
                        *y = g * v * gelu_derivative(*x);
                    }
                }
            },
        );
    });
    gh
}

pub(super) const FORWARD: Kernel = kernel!("geglu", "gelu", "walk");
pub(super) const GRADIENT: Kernel = kernel!("geglu_gradient", "gelu", "walk");

fn on_gpu(gpu: Gpu, h: Tensor<3>, parent: DispatchTensor) -> Tensor<3> {
    let ([b, t, twice], device) = (h.dims(), h.device());
    let inner = twice / 2;
    let width = gpu::width(inner);
    let sizes = [(b * t) as u32, inner as u32, 0, 0];
    let groups = grid((b * t * inner / width as usize).div_ceil(GROUP));
    let (y, from) = (empty([b, t, inner], &device), buffer(&h));
    launch(&gpu, FORWARD, width, &sizes, &[&from, &buffer(&y)], groups);
    node([parent], y, move |g: Tensor<3>, _| {
        let (gh, from, g) = (empty([b, t, twice], &device), buffer(&h), buffer(&g));
        launch(&gpu, GRADIENT, width, &sizes, &[&from, &g, &buffer(&gh)], groups);
        [output(gh)]
    })
}

/// `[B, T, 2 inner] -> [B, T, inner]`.
pub fn geglu(h: Tensor<3>) -> Tensor<3> {
    let ([b, t, width], parent, h) = (h.dims(), input(&h), h.inner());
    if let Some(gpu) = Gpu::of(&h) {
        return on_gpu(gpu, h, parent);
    }
    let (inner, h) = (width / 2, Values::of(&h));
    let y = tensor(forward(&h, inner), [b, t, inner]);
    node([parent], y, move |g: Tensor<3>, _| {
        [output(tensor(gradient(&h, &Values::of(&g), inner), [b, t, width]))]
    })
}
