//! Scaled dot-product attention and diffusers' `Attention` module.

use anyhow::Result;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Tensor, activation};

use super::loader::Loader;
use super::nn::{Linear, on_cpu};
use crate::lora::Lora;

/// Scores of one pass stay below this many elements (64 MiB): within every device's largest
/// binding.
pub const MAX_SCORES: usize = 1 << 24;

/// softmax(q k^T / sqrt(d)) v over `[B, heads, T, d]`; `bias` `[1, 1 or heads, Tq, Tk]` is added to
/// the scores.
///
/// Splits over batch, heads and queries where the scores would not fit one binding.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, bias: Option<Tensor<4>>) -> Tensor<4> {
    let [b, heads, tq, d] = q.dims();
    let tk = k.dims()[2];
    if !q.is_autodiff() && !k.is_autodiff() && on_cpu(&q) {
        // The CPU backend has a fused kernel that never holds the scores; it records no gradient.
        let bias = bias.map(|x| x.expand([b, heads, tq, tk]));
        let options = AttentionModuleOptions::default();
        return burn::tensor::module::attention(q, k, v, None, bias, options);
    }
    scaled_attention(q, k, v, bias, 1.0 / (d as f64).sqrt())
}

/// [`attention`] with a scale of one's own, which T5 leaves at 1.
pub fn scaled_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    bias: Option<Tensor<4>>,
    scale: f64,
) -> Tensor<4> {
    let [b, heads, tq, _] = q.dims();
    let tk = k.dims()[2];
    if b * heads * tq * tk > MAX_SCORES && b * heads * tq > 1 {
        return in_halves(q, k, v, bias, scale);
    }
    let scores = q.matmul(k.swap_dims(2, 3)) * scale;
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    activation::softmax(scores, 3).matmul(v)
}

/// Halves the work over the batch, over heads, or over queries, of which every one sees all keys.
fn in_halves(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    bias: Option<Tensor<4>>,
    scale: f64,
) -> Tensor<4> {
    let [b, heads, tq, _] = q.dims();
    let dim = [b, heads, tq].iter().position(|&n| n > 1).expect("there is something to split");
    let n = q.dims()[dim];
    let half = n / 2;
    let parts = [(0, half), (half, n - half)].map(|(from, len)| {
        let cut = |t: &Tensor<4>| t.clone().narrow(dim, from, len);
        // A bias that is one for all images or all heads is not cut.
        let bias = bias.as_ref().map(|x| if x.dims()[dim] == n { cut(x) } else { x.clone() });
        let (k, v) = if dim == 2 { (k.clone(), v.clone()) } else { (cut(&k), cut(&v)) };
        scaled_attention(cut(&q), k, v, bias, scale)
    });
    Tensor::cat(parts.into(), dim)
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
    pub fn load(
        l: &Loader,
        names: [&str; 4],
        width: usize,
        context: usize,
        heads: usize,
    ) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tensor::{host, upload};
    use crate::philox::{Stream, noise};

    /// However the work is split, over images, heads or queries, and whatever the bias is one for.
    #[test]
    fn attention_in_halves_is_attention() {
        let device = burn::tensor::Device::flex();
        let draw = |i: u32, shape: [usize; 4]| {
            let values = noise(1, Stream::Evaluation, i, 0, shape.iter().product());
            upload(&values, shape, &device)
        };
        for [b, heads, t] in [[3, 2, 5], [1, 3, 5], [1, 1, 5]] {
            let [q, k, v] = [0, 1, 2].map(|i| draw(i, [b, heads, t, 4]));
            for bias in [None, Some([1, 1, t, t]), Some([1, heads, t, t])] {
                let bias = bias.map(|shape| draw(3, shape));
                let whole = scaled_attention(q.clone(), k.clone(), v.clone(), bias.clone(), 1.0);
                let halves = in_halves(q.clone(), k.clone(), v.clone(), bias, 1.0);
                let (whole, halves) = (host(&whole), host(&halves));
                let off = whole.iter().zip(&halves).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-6, "{b} x {heads} x {t}: off by {off:e}");
            }
        }
    }
}
