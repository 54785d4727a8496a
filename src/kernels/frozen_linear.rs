//! `frozen_linear`: x W + b of a layer that does not train, with s (x A) B of its adapter where it
//! has one (Hu et al. 2021). Gradients go to x, A and B; W has none.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::cpu::{Matrix, Values, Write, biased, product, tensor};
use super::frozen_weight::{FrozenWeight, HostWeight};
use super::node::{input, node, output};
use super::product::{Product, Sizes, beginning};
use crate::device::gpu::{Gpu, Kernel, kernel, output as empty};

/// An adapter's matrices: `a` `[inputs, rank]`, `b` `[rank, outputs]`, and the factor of their
/// product.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    pub a: &'a Tensor<2>,
    pub b: &'a Tensor<2>,
    pub scale: f64,
}

/// Rows that an adapter's gradient adds up at a time.
const BLOCK: usize = 128;

/// Rows of x, inputs, outputs, rank.
#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    k: usize,
    n: usize,
    r: usize,
}

/// `x` `[m, k]` times W, added to `y` `[m, n]`.
fn frozen(w: &HostWeight, x: &[f32], y: &mut [f32], s: Shape) {
    w.panels([s.k, s.n], |first, panel| {
        let sizes = [s.m, panel.len() / s.n, s.n];
        let x = Matrix { values: &x[first..], rows: s.k, columns: 1 };
        product(sizes, x, Matrix::new(panel, s.n), 1.0, Write::Add, y, s.n);
    });
}

/// `g` `[m, n]` times W transposed, `[m, k]`.
fn frozen_gradient(w: &HostWeight, g: &[f32], s: Shape) -> Vec<f32> {
    let mut gx = vec![0.0; s.m * s.k];
    w.panels([s.k, s.n], |first, panel| {
        let sizes = [s.m, s.n, panel.len() / s.n];
        let w = Matrix::new(panel, s.n).transposed();
        product(sizes, Matrix::new(g, s.n), w, 1.0, Write::Replace, &mut gx[first..], s.k);
    });
    gx
}

pub(super) const FORWARD: Kernel =
    kernel!(begins beginning, "frozen_linear", "product", "product_forward");
pub(super) const GRADIENT: Kernel =
    kernel!(begins beginning, "frozen_linear_gradient", "product", "product_gradient");

/// A product `[m, k]` times `[k, n]` on a GPU: of [`FORWARD`] with a matrix `[k, n]`, of
/// [`GRADIENT`] with one `[n, k]`, transposed.
pub(super) fn multiply<const D: usize, const E: usize>(
    p: Product,
    sizes: [usize; 3],
    x: &Tensor<D>,
    y: &Tensor<E>,
) {
    let [rows, inner, columns] = sizes.map(|n| n as u32);
    p.run(x, y, Sizes { rows, columns, inner, kernel: [1, 1], ..Sizes::default() });
}

/// The layer on a GPU, with its adapter's product added in place.
fn on_gpu<const D: usize>(
    gpu: Gpu,
    x: Tensor<D>,
    weight: &Arc<FrozenWeight>,
    bias: Option<&Tensor<1>>,
    low: Option<LowRank>,
) -> Tensor<D> {
    let (parent, x, x_shape) = (input(&x), x.clone().inner(), x.dims());
    let mut shape = x_shape;
    shape[D - 1] = weight.columns;
    let (k, n, device) = (weight.rows, weight.columns, x.device());
    let m = x_shape.iter().product::<usize>() / k;
    let y = empty(shape, &device);
    multiply(Product { bias, ..Product::new(&gpu, FORWARD, weight) }, [m, k, n], &x, &y);
    let weight = weight.clone();
    let Some(LowRank { a, b, scale }) = low else {
        return node([parent], y, move |g: Tensor<D>, _| {
            let gx = empty(x_shape, &device);
            multiply(Product::new(&gpu, GRADIENT, &weight), [m, n, k], &g, &gx);
            [output(gx)]
        });
    };
    let parents = [parent, input(a), input(b)];
    let [a, b] = [a, b].map(|matrix| FrozenWeight::trained(matrix.clone().inner()));
    let (r, factor) = (a.columns, scale as f32);
    let down = empty([m, r], &device);
    multiply(Product::new(&gpu, FORWARD, &a), [m, k, r], &x, &down);
    let up = Product { factor, write: Write::Add, ..Product::new(&gpu, FORWARD, &b) };
    multiply(up, [m, r, n], &down, &y);
    node(parents, y, move |g: Tensor<D>, [wants_x, ..]| {
        // The gradient of x A.
        let gd = empty([m, r], &device);
        multiply(Product { factor, ..Product::new(&gpu, GRADIENT, &b) }, [m, n, r], &g, &gd);
        let gx = wants_x.then(|| {
            let gx = empty(x_shape, &device);
            multiply(Product::new(&gpu, GRADIENT, &weight), [m, n, k], &g, &gx);
            let of_adapter = Product { write: Write::Add, ..Product::new(&gpu, GRADIENT, &a) };
            multiply(of_adapter, [m, r, k], &gd, &gx);
            gx
        });
        let ga = x.clone().reshape([m, k]).transpose().matmul(gd);
        let gb = down.clone().transpose().matmul(g.reshape([m, n])) * scale;
        [gx.and_then(output), output(ga), output(gb)]
    })
}

/// `[.., inputs] -> [.., outputs]`.
pub fn frozen_linear<const D: usize>(
    x: Tensor<D>,
    weight: &Arc<FrozenWeight>,
    bias: Option<&Tensor<1>>,
    low: Option<LowRank>,
) -> Tensor<D> {
    if let Some(gpu) = Gpu::of(&x) {
        return on_gpu(gpu, x, weight, bias, low);
    }
    let mut shape = x.dims();
    let (k, n) = (weight.rows, weight.columns);
    let m = shape.iter().product::<usize>() / k;
    let parent = input(&x);
    let (x, w) = (Values::of(&x.inner()), weight.on_host());
    let s = Shape { m, k, n, r: low.map_or(0, |l| l.a.dims()[1]) };
    let x_shape = shape;
    shape[D - 1] = n;
    let mut y = biased(m, n, bias.map(Values::of).as_ref());
    frozen(&w, &x, &mut y, s);
    let Some(low) = low else {
        return node([parent], tensor(y, shape), move |g: Tensor<D>, _| {
            [output(tensor(frozen_gradient(&w, &Values::of(&g), s), x_shape))]
        });
    };
    let parents = [parent, input(low.a), input(low.b)];
    let (a, b) = (Values::of(&low.a.clone().inner()), Values::of(&low.b.clone().inner()));
    let (r, scale) = (s.r, low.scale as f32);
    let mut down = vec![0.0; m * r];
    product([m, k, r], Matrix::new(&x, k), Matrix::new(&a, r), 1.0, Write::Replace, &mut down, r);
    product([m, r, n], Matrix::new(&down, r), Matrix::new(&b, n), scale, Write::Add, &mut y, n);
    node(parents, tensor(y, shape), move |g: Tensor<D>, [wants_x, ..]| {
        let g = Values::of(&g);
        let gm = Matrix::new(&g, n);
        // The gradient of x A.
        let mut gd = vec![0.0; m * r];
        let bt = Matrix::new(&b, n).transposed();
        product([m, n, r], gm, bt, scale, Write::Replace, &mut gd, r);
        let (mut ga, mut gb) = (vec![0.0; k * r], vec![0.0; r * n]);
        // Sums over all rows: a block of them at a time, so that rounding grows with the blocks.
        for first in (0..m).step_by(BLOCK) {
            let rows = BLOCK.min(m - first);
            let xt = Matrix::new(&x[first * k..], k).transposed();
            let gd = Matrix::new(&gd[first * r..], r);
            product([k, rows, r], xt, gd, 1.0, Write::Add, &mut ga, r);
            let dt = Matrix::new(&down[first * r..], r).transposed();
            product(
                [r, rows, n],
                dt,
                Matrix::new(&g[first * n..], n),
                scale,
                Write::Add,
                &mut gb,
                n,
            );
        }
        let gx = wants_x.then(|| {
            let mut gx = frozen_gradient(&w, &g, s);
            let at = Matrix::new(&a, r).transposed();
            product([m, r, k], Matrix::new(&gd, r), at, 1.0, Write::Add, &mut gx, k);
            tensor(gx, x_shape)
        });
        [gx.and_then(output), output(tensor(ga, [k, r])), output(tensor(gb, [r, n]))]
    })
}
