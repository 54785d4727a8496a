//! diffusers' `Attention` module.

use anyhow::Result;
use burn::tensor::Tensor;

use super::conditioning::Conditioning;
use super::loader::Loader;
use super::nn::Linear;
use crate::kernels::attention::{Heads, attention};
use crate::lora::Lora;

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

    /// `x` `[B, T, width]` attends to the sequences `[P, S, context]` of its rows' conditions, to
    /// itself without them.
    pub fn forward(
        &self,
        x: Tensor<3>,
        context: Option<&Conditioning>,
        bias: Option<Tensor<4>>,
        lora: Option<&Lora>,
    ) -> Tensor<3> {
        let keys = |from: &Tensor<3>| {
            [&self.to_k, &self.to_v].map(|layer| layer.forward(from.clone(), lora))
        };
        let [k, v] = match context {
            None => keys(&x),
            Some(c) => c.keys(&self.to_k.shape.name, keys).map(|few| c.rows.spread(few)),
        };
        let q = self.to_q.forward(x, lora);
        let heads = Heads::of(self.heads, q.dims()[2]);
        let y = attention(q, k, v, bias, heads);
        self.to_out.forward(y, lora)
    }

    /// The layers that a LoRA can target.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.to_q, &self.to_k, &self.to_v, &self.to_out]
    }
}
