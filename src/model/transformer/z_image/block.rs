//! diffusers' `ZImageTransformerBlock`.

use anyhow::Result;
use burn::tensor::Tensor;

use super::config::ZImageConfig;
use crate::kernels::attention::{Heads, attention};
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::StoredBlock;
use crate::model::denoiser::Fixed;
use crate::model::loader::Loader;
use crate::model::nn::{Linear, RmsNorm, silu_gated};
use crate::model::transformer::rotary::{Turns, rotate};

/// eps of the norms of queries and keys.
const QK_EPS: f64 = 1e-5;

/// What a norm is multiplied by, `[B, width]`.
enum Factor {
    None,
    Constant(Tensor<2>),
    /// By way of an adapter, which asks for its gradient: the kernel holds what it multiplies by
    /// constant.
    Trained(Tensor<2>),
}

impl Factor {
    fn norm(self, norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::None => norm.forward(x),
            Self::Constant(factor) => norm.times(x, factor),
            Self::Trained(factor) => norm.forward(x) * factor.unsqueeze_dim::<3>(1),
        }
    }
}

/// A block of one stream of tokens, whose attention and feed-forward are normed before and after.
pub struct ZImageBlock {
    heads: usize,
    /// q, k, v and out.
    attention: [Linear; 4],
    qk_norms: Option<[RmsNorm; 2]>,
    /// silu(w1) w3, and back by w2.
    feed_forward: [Linear; 3],
    /// Before and after attention, before and after the feed-forward.
    norms: [RmsNorm; 4],
    modulation: Option<Linear>,
}

impl ZImageBlock {
    /// # Errors
    /// Names the tensor that is missing or of the wrong shape.
    pub fn load(l: &Loader, c: &ZImageConfig, modulated: bool) -> Result<Self> {
        let (width, inner) = (c.width, c.inner());
        let (attention, ff) = (l.at("attention"), l.at("feed_forward"));
        let project = |part: &str| Linear::load(&attention, part, width, width);
        let qk = |part: &str| RmsNorm::load(&attention, part, width / c.heads, QK_EPS);
        let norm = |part: &str| RmsNorm::load(l, part, width, c.eps);
        let modulation = || Linear::load(l, "adaLN_modulation.0", c.modulation(), 4 * width);
        Ok(Self {
            heads: c.heads,
            attention: [project("to_q")?, project("to_k")?, project("to_v")?, project("to_out.0")?],
            qk_norms: if c.qk_norm { Some([qk("norm_q")?, qk("norm_k")?]) } else { None },
            feed_forward: [
                Linear::load(&ff, "w1", width, inner)?,
                Linear::load(&ff, "w2", inner, width)?,
                Linear::load(&ff, "w3", width, inner)?,
            ],
            norms: [
                norm("attention_norm1")?,
                norm("attention_norm2")?,
                norm("ffn_norm1")?,
                norm("ffn_norm2")?,
            ],
            modulation: if modulated { Some(modulation()?) } else { None },
        })
    }

    /// `[B, T, width]`; each row attends to its first `keys` tokens, at positions whose `turns` are
    /// given for each row, or for all.
    pub fn forward(
        &self,
        x: Tensor<3>,
        keys: &[usize],
        turns: &Turns,
        fixed: &Fixed,
        lora: Option<&Lora>,
    ) -> Tensor<3> {
        let [before, after, ff_before, ff_after] = self.factors(fixed, lora);
        let h = before.norm(&self.norms[0], x.clone());
        let x = x + after.norm(&self.norms[1], self.attend(h, keys, turns, lora));
        let h = ff_before.norm(&self.norms[2], x.clone());
        x + ff_after.norm(&self.norms[3], self.feed(h, lora))
    }

    /// What the four norms are multiplied by.
    fn factors(&self, fixed: &Fixed, lora: Option<&Lora>) -> [Factor; 4] {
        let Some(linear) = &self.modulation else { return std::array::from_fn(|_| Factor::None) };
        let few = linear.forward(fixed.time.clone(), lora);
        let parts = fixed.cond.rows.spread(few).chunk(4, 1);
        let [scale, gate, ff_scale, ff_gate]: [Tensor<2>; 4] =
            parts.try_into().expect("four parts of a width each");
        let adapted = lora.is_some_and(|l| l.get(&linear.shape.name).is_some());
        [scale + 1.0, gate.tanh(), ff_scale + 1.0, ff_gate.tanh()].map(|factor| match adapted {
            true => Factor::Trained(factor),
            false => Factor::Constant(factor),
        })
    }

    fn feed(&self, x: Tensor<3>, lora: Option<&Lora>) -> Tensor<3> {
        let [w1, w2, w3] = &self.feed_forward;
        w2.forward(silu_gated(w1.forward(x.clone(), lora), w3.forward(x, lora)), lora)
    }

    fn attend(
        &self,
        x: Tensor<3>,
        keys: &[usize],
        turns: &Turns,
        lora: Option<&Lora>,
    ) -> Tensor<3> {
        let [b, t, width] = x.dims();
        let [q, k, v, out] = &self.attention;
        let split = |linear: &Linear| {
            linear.forward(x.clone(), lora).reshape([b, t, self.heads, width / self.heads])
        };
        let (q, k) = (split(q), split(k));
        let (q, k) = match &self.qk_norms {
            Some([nq, nk]) => (nq.forward(q), nk.forward(k)),
            None => (q, k),
        };
        let [q, k] = [q, k].map(|x| rotate(x, turns).reshape([b, t, width]));
        let v = v.forward(x, lora);
        let heads = Heads::of(self.heads, width);
        // Rows of one number of keys at a time: a shorter row's numbers are those that it has
        // alone.
        let mut parts = Vec::new();
        let mut first = 0;
        for group in keys.chunk_by(|a, b| a == b) {
            let (n, own) = (group.len(), group[0].min(t));
            let rows = |x: &Tensor<3>, t: usize| x.clone().narrow(0, first, n).narrow(1, 0, t);
            parts.push(attention(rows(&q, t), rows(&k, own), rows(&v, own), None, heads));
            first += n;
        }
        let y = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) };
        out.forward(y, lora)
    }
}

impl StoredBlock for ZImageBlock {
    type Layer = LayerShape;

    fn layers(&self) -> Vec<LayerShape> {
        let all = self.attention.iter().chain(&self.feed_forward).chain(&self.modulation);
        all.map(|linear| linear.shape.clone()).collect()
    }
}
