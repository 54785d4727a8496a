//! Scaled dot-product attention and diffusers' `Attention` module.

use anyhow::Result;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Tensor, activation};

use super::nn::{Linear, on_cpu};
use super::weights::Loader;
use crate::lora::Lora;

/// Scores of one pass stay below this many elements (64 MiB): within every device's largest binding.
const MAX_SCORES: usize = 1 << 24;

/// softmax(q k^T / sqrt(d)) v over `[B, heads, T, d]`; `bias` `[1, 1, Tq, Tk]` is added to the scores.
///
/// Splits over batch, heads and queries where the scores would not fit one binding.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, bias: Option<Tensor<4>>) -> Tensor<4> {
    let [b, heads, tq, d] = q.dims();
    let tk = k.dims()[2];
    if !q.is_autodiff() && !k.is_autodiff() && on_cpu(&q) {
        // The CPU backend has a fused kernel that never holds the scores; it records no gradient.
        let bias = bias.map(|x| x.expand([b, heads, tq, tk]));
        return burn::tensor::module::attention(q, k, v, None, bias, AttentionModuleOptions::default());
    }
    if b * heads * tq * tk > MAX_SCORES && b * heads * tq > 1 {
        let (dim, n) = if b > 1 {
            (0, b)
        } else if heads > 1 {
            (1, heads)
        } else {
            (2, tq)
        };
        let half = n / 2;
        let cut = |t: &Tensor<4>, from: usize, len: usize| t.clone().narrow(dim, from, len);
        let parts = [(0, half), (half, n - half)].map(|(from, len)| match dim {
            // Queries alone: every one sees all keys. A bias has a row for each.
            2 => attention(cut(&q, from, len), k.clone(), v.clone(), bias.as_ref().map(|x| cut(x, from, len))),
            _ => attention(cut(&q, from, len), cut(&k, from, len), cut(&v, from, len), bias.clone()),
        });
        return Tensor::cat(parts.into(), dim);
    }
    let scores = q.matmul(k.swap_dims(2, 3)) * (1.0 / (d as f64).sqrt());
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    activation::softmax(scores, 3).matmul(v)
}

/// diffusers' `Attention` without its norm: projections, heads, output projection.
pub struct Attention {
    heads: usize,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    /// `names` are the parts' names, `["to_q", "to_k", "to_v", "to_out.0"]` in today's diffusers.
    pub fn load(l: &Loader, names: [&str; 4], width: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            heads,
            to_q: Linear::load(l, names[0], width, width)?,
            to_k: Linear::load(l, names[1], context, width)?,
            to_v: Linear::load(l, names[2], context, width)?,
            to_out: Linear::load(l, names[3], width, width)?,
        })
    }

    /// `x` `[B, T, width]` attends to `context` `[B, S, context]`, to itself without one.
    pub fn forward(
        &self,
        x: Tensor<3>,
        context: Option<&Tensor<3>>,
        bias: Option<Tensor<4>>,
        lora: Option<&Lora>,
    ) -> Tensor<3> {
        let [b, t, width] = x.dims();
        let context = context.cloned().unwrap_or_else(|| x.clone());
        let s = context.dims()[1];
        let d = width / self.heads;
        let split = |y: Tensor<3>, n: usize| y.reshape([b, n, self.heads, d]).swap_dims(1, 2);
        let q = split(self.to_q.forward(x, lora), t);
        let k = split(self.to_k.forward(context.clone(), lora), s);
        let v = split(self.to_v.forward(context, lora), s);
        let y = attention(q, k, v, bias).swap_dims(1, 2).reshape([b, t, width]);
        self.to_out.forward(y, lora)
    }

    /// The layers that a LoRA can target.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.to_q, &self.to_k, &self.to_v, &self.to_out]
    }
}
