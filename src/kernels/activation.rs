//! `activation`: a function of each element, exact in value and gradient.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;

use super::cpu::{Values, tensor};
use super::gpu::{grid, launch};
use super::node::{input, node, output};
use super::threads::parts;
use super::vector::{erf, exp, sigmoid, tanh, vectorised};
use crate::device::gpu::{self, Gpu, Kernel, buffer, kernel, output as empty};

/// The functions, by diffusers' and transformers' names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    Silu,
    /// x Phi(x), by erf.
    Gelu,
    /// gelu by tanh: `gelu-approximate` in diffusers, `gelu_new` in transformers.
    GeluTanh,
    QuickGelu,
    Relu,
}

const ROOT: f32 = 0.797_884_6; // sqrt(2 / pi)
const CUBE: f32 = 0.044_715;
const QUICK: f32 = 1.702;

/// Phi(x), the normal distribution below x.
#[inline(always)]
fn phi(x: f32) -> f32 {
    erf(x * std::f32::consts::FRAC_1_SQRT_2).mul_add(0.5, 0.5)
}

#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    x * phi(x)
}

#[inline(always)]
pub fn gelu_derivative(x: f32) -> f32 {
    const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    (x * DENSITY).mul_add(exp(-0.5 * x * x), phi(x))
}

/// Where sigmoid has nothing left, so that no product of a huge number and a tiny one is taken.
#[inline(always)]
fn above(x: f32, least: f32) -> f32 {
    if x < least { least } else { x }
}

#[inline(always)]
pub fn silu(x: f32) -> f32 {
    let x = above(x, -87.0);
    x * sigmoid(x)
}

#[inline(always)]
pub fn silu_derivative(x: f32) -> f32 {
    let x = above(x, -87.0);
    let s = sigmoid(x);
    s * x.mul_add(1.0 - s, 1.0)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(ROOT * x * (CUBE * x).mul_add(x, 1.0)))
}

#[inline(always)]
fn gelu_tanh_derivative(x: f32) -> f32 {
    let t = tanh(ROOT * x * (CUBE * x).mul_add(x, 1.0));
    let slope = ROOT * (3.0 * CUBE * x).mul_add(x, 1.0);
    0.5 * (1.0 + t + x * (1.0 - t * t) * slope)
}

#[inline(always)]
fn quick(x: f32) -> f32 {
    let x = above(x, -51.0);
    x * sigmoid(QUICK * x)
}

#[inline(always)]
fn quick_derivative(x: f32) -> f32 {
    let x = above(x, -51.0);
    let s = sigmoid(QUICK * x);
    s * (QUICK * x).mul_add(1.0 - s, 1.0)
}

/// Elements of one part of the work.
const PART: usize = 1 << 13;

#[inline(always)]
fn each(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    parts(&mut y, PART, |i, y| {
        let x = &x[i * PART..][..y.len()];
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x)),
        );
    });
    y
}

#[inline(always)]
fn each_gradient(x: &[f32], g: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    parts(&mut y, PART, |i, y| {
        let (x, g) = (&x[i * PART..][..y.len()], &g[i * PART..][..y.len()]);
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x.iter().zip(g)).for_each(|(y, (x, g))| *y = g * f(*x)),
        );
    });
    y
}

/// The values on the CPU.
pub fn forward(kind: Activation, x: &[f32]) -> Vec<f32> {
    match kind {
        Activation::Silu => each(x, silu),
        Activation::Gelu => each(x, gelu),
        Activation::GeluTanh => each(x, gelu_tanh),
        Activation::QuickGelu => each(x, quick),
        // NaN stays.
        Activation::Relu => each(x, |x| if x < 0.0 { 0.0 } else { x }),
    }
}

/// The gradient of the input on the CPU.
pub fn gradient(kind: Activation, x: &[f32], g: &[f32]) -> Vec<f32> {
    match kind {
        Activation::Silu => each_gradient(x, g, silu_derivative),
        Activation::Gelu => each_gradient(x, g, gelu_derivative),
        Activation::GeluTanh => each_gradient(x, g, gelu_tanh_derivative),
        Activation::QuickGelu => each_gradient(x, g, quick_derivative),
        Activation::Relu => each_gradient(x, g, |x| if x > 0.0 { 1.0 } else { 0.0 }),
    }
}

pub(super) const FORWARD: Kernel = kernel!("activation", "sigmoid", "gelu", "activations", "walk");
pub(super) const GRADIENT: Kernel =
    kernel!("activation_gradient", "sigmoid", "gelu", "activations", "walk");

/// Kept in sync with `shaders/activation.wgsl`: units of lanes, and the number of the function.
type Sizes = [u32; 4];

/// Units that a workgroup walks over.
pub(super) const GROUP: usize = 512;

fn on_gpu<const D: usize>(
    gpu: Gpu,
    kind: Activation,
    x: Tensor<D>,
    parent: DispatchTensor,
) -> Tensor<D> {
    let n: usize = x.dims().iter().product();
    let width = gpu::width(n);
    let units = n / width as usize;
    let sizes: Sizes = [units as u32, kind as u32, 0, 0];
    let like = |x: &Tensor<D>| empty(x.dims(), &x.device());
    let (y, from) = (like(&x), buffer(&x));
    let groups = grid(units.div_ceil(GROUP));
    launch(&gpu, FORWARD, width, &sizes, &[&from, &buffer(&y)], groups);
    node([parent], y, move |g: Tensor<D>, _| {
        let (gx, from, g) = (like(&x), buffer(&x), buffer(&g));
        launch(&gpu, GRADIENT, width, &sizes, &[&from, &g, &buffer(&gx)], groups);
        [output(gx)]
    })
}

/// The function of each element.
pub fn activation<const D: usize>(kind: Activation, x: Tensor<D>) -> Tensor<D> {
    let (parent, shape, x) = (input(&x), x.dims(), x.inner());
    if let Some(gpu) = Gpu::of(&x) {
        return on_gpu(gpu, kind, x, parent);
    }
    let x = Values::of(&x);
    let y = tensor(forward(kind, &x), shape);
    node([parent], y, move |g: Tensor<D>, _| {
        [output(tensor(gradient(kind, &x, &Values::of(&g)), shape))]
    })
}
