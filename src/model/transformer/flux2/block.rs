//! The blocks of diffusers' `Flux2Transformer2DModel`.

use anyhow::Result;
use burn::tensor::Tensor;

use super::config::Flux2Config;
use crate::kernels::attention::{Heads, attention};
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::StoredBlock;
use crate::model::loader::Loader;
use crate::model::nn::{Linear, RmsNorm, silu_gated};
use crate::model::transformer::joint::{Gated, JointAttention, Output};
use crate::model::transformer::rotary::{Turns, rotate};

/// silu(a) b of the halves of a last dimension.
fn gated_halves(x: Tensor<3>) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    silu_gated(x.clone().narrow(2, 0, half), x.narrow(2, half, half))
}

/// diffusers' `Flux2FeedForward`.
struct FeedForward {
    input: Linear,
    output: Linear,
}

impl FeedForward {
    fn load(l: &Loader, c: &Flux2Config) -> Result<Self> {
        Ok(Self {
            input: Linear::load(l, "linear_in", c.width, 2 * c.inner)?,
            output: Linear::load(l, "linear_out", c.inner, c.width)?,
        })
    }

    fn forward(&self, x: Tensor<3>, lora: Option<&Lora>) -> Tensor<3> {
        self.output.forward(gated_halves(self.input.forward(x, lora)), lora)
    }
}

/// diffusers' `Flux2TransformerBlock`: text and image with weights of their own.
pub struct Double {
    attn: JointAttention,
    ff: [FeedForward; 2],
}

impl Double {
    pub fn load(l: &Loader, c: &Flux2Config) -> Result<Self> {
        let out = Output::Projected;
        Ok(Self {
            attn: JointAttention::load(&l.at("attn"), c.spec(), out, Some(out))?,
            ff: [FeedForward::load(&l.at("ff"), c)?, FeedForward::load(&l.at("ff_context"), c)?],
        })
    }

    /// Image and text tokens, with what each is modulated with.
    pub fn forward(
        &self,
        [x, text]: [Tensor<3>; 2],
        [image, context]: [Vec<Gated>; 2],
        rotary: Option<&Turns>,
        lora: Option<&Lora>,
    ) -> [Tensor<3>; 2] {
        let image_in = image[0].shift.norm(x.clone());
        let text_in = context[0].shift.norm(text.clone());
        let (image_out, text_out) = self.attn.forward(image_in, Some(text_in), rotary, lora);
        let rest = |x: Tensor<3>, out: Tensor<3>, m: &[Gated], ff: &FeedForward| {
            let x = x + out * m[0].gate.clone();
            let h = m[1].shift.norm(x.clone());
            x + ff.forward(h, lora) * m[1].gate.clone()
        };
        let text_out = text_out.expect("attention over text gives text");
        [rest(x, image_out, &image, &self.ff[0]), rest(text, text_out, &context, &self.ff[1])]
    }
}

/// diffusers' `Flux2SingleTransformerBlock`: text and image in one stream, attention and
/// feed-forward side by side in one projection.
pub struct Single {
    heads: usize,
    inner: usize,
    input: Linear,
    norms: [RmsNorm; 2],
    output: Linear,
}

impl Single {
    pub fn load(l: &Loader, c: &Flux2Config) -> Result<Self> {
        let l = l.at("attn");
        let norm = |part: &str| RmsNorm::load(&l, part, c.width / c.heads, 1e-6);
        Ok(Self {
            heads: c.heads,
            inner: c.inner,
            input: Linear::load(&l, "to_qkv_mlp_proj", c.width, 3 * c.width + 2 * c.inner)?,
            norms: [norm("norm_q")?, norm("norm_k")?],
            output: Linear::load(&l, "to_out", c.width + c.inner, c.width)?,
        })
    }

    pub fn forward(
        &self,
        x: Tensor<3>,
        m: &Gated,
        rotary: Option<&Turns>,
        lora: Option<&Lora>,
    ) -> Tensor<3> {
        let [b, t, width] = x.dims();
        let wide = self.input.forward(m.shift.norm(x.clone()), lora);
        let head = |i: usize| {
            let part = wide.clone().narrow(2, i * width, width);
            part.reshape([b, t, self.heads, width / self.heads])
        };
        let turn = |x: Tensor<4>| match rotary {
            Some(turns) => rotate(x, turns),
            None => x,
        };
        let (q, k) = (turn(self.norms[0].forward(head(0))), turn(self.norms[1].forward(head(1))));
        let [q, k, v] = [q, k, head(2)].map(|x| x.reshape([b, t, width]));
        let attended = attention(q, k, v, None, Heads::of(self.heads, width));
        let fed = gated_halves(wide.narrow(2, 3 * width, 2 * self.inner));
        let y = self.output.forward(Tensor::cat(vec![attended, fed], 2), lora);
        x + y * m.gate.clone()
    }
}

/// A block of either kind.
pub enum Block {
    Double(Box<Double>),
    Single(Box<Single>),
}

impl StoredBlock for Block {
    type Layer = LayerShape;

    fn layers(&self) -> Vec<LayerShape> {
        let linears: Vec<&Linear> = match self {
            Self::Double(block) => {
                let ff = block.ff.iter().flat_map(|ff| [&ff.input, &ff.output]);
                block.attn.linears().chain(ff).collect()
            }
            Self::Single(block) => vec![&block.input, &block.output],
        };
        linears.into_iter().map(|l| l.shape.clone()).collect()
    }
}
