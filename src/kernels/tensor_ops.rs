//! The kernels' mathematics as plain Burn tensor operations: what a network would run without them.
//! Tests hold the kernels to it, benchmarks compare against it on the same device.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use burn::tensor::Tensor;
use burn::tensor::activation::{relu, sigmoid, softmax};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use super::activation::Activation;
use super::attention::Heads;
use super::frozen_conv::ConvShape;

/// See [`super::activation`].
pub fn activation<const D: usize>(kind: Activation, x: Tensor<D>) -> Tensor<D> {
    match kind {
        Activation::Silu => x.clone() * sigmoid(x),
        Activation::Gelu => x.clone() * ((x * FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Activation::GeluTanh => {
            let root = FRAC_2_PI.sqrt();
            let inner = x.clone() * (x.clone().square() * (0.044715 * root) + root);
            x * (inner.tanh() + 1.0) * 0.5
        }
        Activation::QuickGelu => x.clone() * sigmoid(x * 1.702),
        Activation::Relu => relu(x),
    }
}

/// See [`super::geglu`].
pub fn geglu(h: Tensor<3>) -> Tensor<3> {
    let [value, gate]: [Tensor<3>; 2] = h.chunk(2, 2).try_into().expect("two halves");
    value * activation(Activation::Gelu, gate)
}

/// `x` less its mean over dimension `dim`, over its deviation.
fn normalised<const D: usize>(x: Tensor<D>, dim: usize, eps: f64) -> Tensor<D> {
    let x = x.clone() - x.mean_dim(dim);
    let rstd = (x.clone().square().mean_dim(dim) + eps).sqrt().recip();
    x * rstd
}

/// See [`super::layer_norm`].
pub fn layer_norm(x: Tensor<3>, gamma: Tensor<2>, beta: Tensor<2>, eps: f64) -> Tensor<3> {
    normalised(x, 2, eps) * gamma.unsqueeze_dim::<3>(1) + beta.unsqueeze_dim::<3>(1)
}

/// See [`super::rms_norm`].
pub fn rms_norm(x: Tensor<3>, gamma: Tensor<2>, eps: f64) -> Tensor<3> {
    let reciprocal = (x.clone().square().mean_dim(2) + eps).sqrt().recip();
    x * reciprocal * gamma.unsqueeze_dim::<3>(1)
}

/// See [`super::group_norm_silu`]; channels are first, `[B, C, H, W]`.
pub fn group_norm_silu(
    x: Tensor<4>,
    groups: usize,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    eps: f64,
    silu: bool,
) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    let x = normalised(x.reshape([b, groups, h * w * c / groups]), 2, eps);
    let affine = |v: Tensor<1>| v.reshape([1, c, 1, 1]);
    let y = x.reshape([b, c, h, w]) * affine(gamma) + affine(beta);
    if silu { activation(Activation::Silu, y) } else { y }
}

/// See [`super::frozen_conv`]; channels are first, and the weight is `[cout, cin, k, k]`.
pub fn conv(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>, s: ConvShape) -> Tensor<4> {
    let options = ConvOptions::new([s.stride; 2], [s.padding; 2], [1, 1], 1);
    conv2d(x, weight, Some(bias), options)
}

/// See [`super::frozen_linear`], by a weight `[inputs, outputs]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Tensor<1>) -> Tensor<3> {
    x.matmul(weight.unsqueeze::<3>()) + bias.unsqueeze::<3>()
}

/// See [`super::attention`].
pub fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    bias: Option<Tensor<4>>,
    Heads { heads, scale }: Heads,
) -> Tensor<3> {
    let [b, queries, width] = q.dims();
    let split = |x: Tensor<3>| {
        let tokens = x.dims()[1];
        x.reshape([b, tokens, heads, width / heads]).swap_dims(1, 2)
    };
    let scores = split(q).matmul(split(k).swap_dims(2, 3)) * scale;
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    softmax(scores, 3).matmul(split(v)).swap_dims(1, 2).reshape([b, queries, width])
}
