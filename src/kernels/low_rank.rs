//! `low_rank`: s (x A) B of a convolution's adapter (Hu et al. 2021; LoCon), where x are the
//! pixels' neighbourhoods. Gradients go to x, A and B.

use burn::tensor::Tensor;

use super::cpu::{Matrix, Values, Write, product, tensor};
use super::frozen_conv::ConvShape;
use super::frozen_linear::{FORWARD, GRADIENT, LowRank, multiply};
use super::frozen_weight::FrozenWeight;
use super::node::{input, node, output};
use super::product::Product;
use crate::device::gpu::{Gpu, output as empty};
use crate::device::tensor::index;

/// Rows that a gradient adds up at a time.
const BLOCK: usize = 128;

/// `[B, H, W, cin] -> [B, H', W', cout]`: the adapter's part of a convolution.
pub fn low_rank(x: Tensor<4>, shape: ConvShape, low: LowRank) -> Tensor<4> {
    let x = neighbourhoods(x, shape);
    let [b, h, w, inner] = x.dims();
    let down = trained(x.reshape([b * h * w, inner]), low.a);
    (trained(down, low.b) * low.scale).reshape([b, h, w, shape.cout])
}

/// What each output sees, `[B, H', W', kernel kernel cin]`, place by place as frozen weights have
/// it.
fn neighbourhoods(x: Tensor<4>, shape: ConvShape) -> Tensor<4> {
    let ConvShape { kernel, stride, padding: p, .. } = shape;
    if (kernel, stride, p) == (1, 1, 0) {
        return x;
    }
    let x = if p > 0 { x.pad([(0, 0), (p, p), (p, p), (0, 0)], 0.0) } else { x };
    let [_, h, w, _] = x.dims();
    let out = [h, w].map(|side| (side - kernel) / stride + 1);
    let along = |x: Tensor<4>, dim: usize, from: usize, n: usize| {
        if stride == 1 {
            return x.narrow(dim, from, n);
        }
        let at: Vec<usize> = (0..n).map(|i| from + i * stride).collect();
        let at = index(&at, &x.device());
        x.select(dim, at)
    };
    let place = |i: usize| {
        let rows = along(x.clone(), 1, i / kernel, out[0]);
        along(rows, 2, i % kernel, out[1])
    };
    Tensor::cat((0..kernel * kernel).map(place).collect(), 3)
}

/// `x` `[m, k]` times a matrix that trains, `[k, n]`. On the CPU a row's numbers do not depend on
/// the rows beside it.
fn trained(x: Tensor<2>, w: &Tensor<2>) -> Tensor<2> {
    let ([m, k], [_, n]) = (x.dims(), w.dims());
    let parents = [input(&x), input(w)];
    let (x, w) = (x.inner(), w.clone().inner());
    if let Some(gpu) = Gpu::of(&x) {
        let (w, device) = (FrozenWeight::trained(w), x.device());
        let y = empty([m, n], &device);
        multiply(Product::new(&gpu, FORWARD, &w), [m, k, n], &x, &y);
        return node(parents, y, move |g: Tensor<2>, [wants_x, _]| {
            let gx = wants_x.then(|| {
                let gx = empty([m, k], &device);
                multiply(Product::new(&gpu, GRADIENT, &w), [m, n, k], &g, &gx);
                gx
            });
            [gx.and_then(output), output(x.clone().transpose().matmul(g))]
        });
    }
    let (x, w) = (Values::of(&x), Values::of(&w));
    let mut y = vec![0.0; m * n];
    product([m, k, n], Matrix::new(&x, k), Matrix::new(&w, n), 1.0, Write::Replace, &mut y, n);
    node(parents, tensor(y, [m, n]), move |g: Tensor<2>, [wants_x, _]| {
        let g = Values::of(&g);
        let mut gw = vec![0.0; k * n];
        // Sums over all rows: a block of them at a time, so that rounding grows with the blocks.
        for first in (0..m).step_by(BLOCK) {
            let rows = BLOCK.min(m - first);
            let xt = Matrix::new(&x[first * k..], k).transposed();
            product([k, rows, n], xt, Matrix::new(&g[first * n..], n), 1.0, Write::Add, &mut gw, n);
        }
        let gx = wants_x.then(|| {
            let mut gx = vec![0.0; m * k];
            let wt = Matrix::new(&w, n).transposed();
            product([m, n, k], Matrix::new(&g, n), wt, 1.0, Write::Replace, &mut gx, k);
            tensor(gx, [m, k])
        });
        [gx.and_then(output), output(tensor(gw, [k, n]))]
    })
}
