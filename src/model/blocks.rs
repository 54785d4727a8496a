//! The building blocks that diffusers' networks share: `ResnetBlock2D`, `Transformer2DModel`,
//! `Downsample2D`, `Upsample2D`, `TimestepEmbedding` and `FeedForward`.

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};

use super::attention::Attention;
use super::conditioning::Conditioning;
use super::loader::Loader;
use super::nn::{Activation, Conv2d, GroupNorm, LayerNorm, Linear};
use super::row_map::RowMap;
use crate::device::tensor::index;
use crate::kernels::frozen_conv::ConvShape;
use crate::kernels::geglu::geglu;
use crate::lora::{LayerShape, Lora};

/// The embedding of time of few conditions, and which of them each row has.
#[derive(Clone, Copy)]
pub struct Time<'a> {
    /// `[P, width]`
    pub embedding: &'a Tensor<2>,
    pub rows: &'a RowMap,
}

/// How a `ResnetBlock2D` is built.
#[derive(Clone, Copy, Debug)]
pub struct ResnetSpec {
    pub groups: usize,
    pub eps: f64,
    pub activation: Activation,
    /// Width of the time embedding, where there is one.
    pub time: Option<usize>,
    /// resnet_time_scale_shift = "scale_shift": the embedding scales and shifts instead of being
    /// added.
    pub scale_shift: bool,
    pub output_scale: f64,
}

/// diffusers' `ResnetBlock2D`.
pub struct Resnet {
    spec: ResnetSpec,
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Resnet {
    pub fn load(l: &Loader, cin: usize, cout: usize, spec: ResnetSpec) -> Result<Self> {
        let time_width = if spec.scale_shift { 2 * cout } else { cout };
        Ok(Self {
            spec,
            norm1: GroupNorm::load(l, "norm1", spec.groups, cin, spec.eps)?,
            conv1: Conv2d::same(l, "conv1", cin, cout)?,
            time_emb_proj: spec
                .time
                .map(|t| Linear::load(l, "time_emb_proj", t, time_width))
                .transpose()?,
            norm2: GroupNorm::load(l, "norm2", spec.groups, cout, spec.eps)?,
            conv2: Conv2d::same(l, "conv2", cout, cout)?,
            shortcut: if cin == cout {
                None
            } else {
                Some(Conv2d::point(&l.in_f32(), "conv_shortcut", cin, cout)?)
            },
        })
    }

    /// `x` `[B, H, W, cin]`, `time` of the rows' conditions (after its own activation) ->
    /// `[B, H, W, cout]`.
    pub fn forward(&self, x: Tensor<4>, time: Option<Time>, lora: Option<&Lora>) -> Tensor<4> {
        let act = self.spec.activation;
        let mut h = self.conv1.adapted(self.norm1.activated(x.clone(), act), lora);
        let time = match (&self.time_emb_proj, time) {
            (Some(proj), Some(Time { embedding, rows })) => {
                let few = proj.forward(embedding.clone(), lora);
                Some(rows.spread(few).unsqueeze_dims::<4>(&[1, 2]))
            }
            _ => None,
        };
        h = match time {
            Some(t) if self.spec.scale_shift => {
                let [scale, shift]: [Tensor<4>; 2] = t.chunk(2, 3).try_into().expect("two halves");
                act.forward(self.norm2.forward(h) * (scale + 1.0) + shift)
            }
            Some(t) => self.norm2.activated(h + t, act),
            None => self.norm2.activated(h, act),
        };
        h = self.conv2.adapted(h, lora);
        let x = match &self.shortcut {
            Some(conv) => conv.adapted(x, lora),
            None => x,
        };
        if self.spec.output_scale == 1.0 { x + h } else { (x + h) / self.spec.output_scale }
    }

    /// The layers that a LoRA can target.
    pub fn targets(&self) -> impl Iterator<Item = &LayerShape> {
        let convs = [&self.conv1, &self.conv2].into_iter().chain(&self.shortcut);
        let time = self.time_emb_proj.iter().map(|linear| &linear.shape);
        convs.map(|conv| &conv.shape).chain(time)
    }
}

/// diffusers' `BasicTransformerBlock` with GEGLU feed-forward.
struct TransformerBlock {
    only_cross: bool,
    norms: [LayerNorm; 3],
    attn1: Attention,
    attn2: Attention,
    ff: FeedForward,
}

const DIFFUSERS_ATTENTION: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

impl TransformerBlock {
    fn load(
        l: &Loader,
        width: usize,
        context: usize,
        heads: usize,
        only_cross: bool,
    ) -> Result<Self> {
        let norm = |n: &str| LayerNorm::load(l, n, width, 1e-5);
        let own = if only_cross { context } else { width };
        Ok(Self {
            only_cross,
            norms: [norm("norm1")?, norm("norm2")?, norm("norm3")?],
            attn1: Attention::load(&l.at("attn1"), DIFFUSERS_ATTENTION, width, own, heads)?,
            attn2: Attention::load(&l.at("attn2"), DIFFUSERS_ATTENTION, width, context, heads)?,
            ff: FeedForward::load(&l.at("ff"), width, true)?,
        })
    }

    fn forward(&self, x: Tensor<3>, context: &Conditioning, lora: Option<&Lora>) -> Tensor<3> {
        let own = self.only_cross.then_some(context);
        let x = x.clone() + self.attn1.forward(self.norms[0].forward(x), own, None, lora);
        let x = x.clone() + self.attn2.forward(self.norms[1].forward(x), Some(context), None, lora);
        x.clone() + self.ff.forward(self.norms[2].forward(x), lora)
    }
}

enum Projection {
    Linear(Linear),
    Conv(Conv2d),
}

/// diffusers' `Transformer2DModel` (continuous input), with convolution or linear projections.
pub struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

/// How a `Transformer2d` is built.
#[derive(Clone, Copy)]
pub struct TransformerSpec {
    pub groups: usize,
    pub heads: usize,
    pub layers: usize,
    pub context: usize,
    pub linear: bool,
    pub only_cross: bool,
}

impl Transformer2d {
    pub fn load(l: &Loader, c: usize, spec: TransformerSpec) -> Result<Self> {
        let projection = |part: &str| {
            Ok::<_, anyhow::Error>(if spec.linear {
                Projection::Linear(Linear::load(l, part, c, c)?)
            } else {
                Projection::Conv(Conv2d::point(l, part, c, c)?)
            })
        };
        Ok(Self {
            norm: GroupNorm::load(l, "norm", spec.groups, c, 1e-6)?,
            proj_in: projection("proj_in")?,
            blocks: (0..spec.layers)
                .map(|i| {
                    let l = l.at(format!("transformer_blocks.{i}"));
                    TransformerBlock::load(&l, c, spec.context, spec.heads, spec.only_cross)
                })
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x` `[B, H, W, C]` of B conditioned images -> `[B, H, W, C]`.
    pub fn forward(&self, x: Tensor<4>, context: &Conditioning, lora: Option<&Lora>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let tokens = |x: Tensor<4>| x.reshape([b, h * w, c]);
        let image = |x: Tensor<3>| x.reshape([b, h, w, c]);
        let y = self.norm.forward(x.clone());
        let mut y = match &self.proj_in {
            Projection::Linear(p) => p.forward(tokens(y), lora),
            Projection::Conv(p) => tokens(p.adapted(y, lora)),
        };
        for block in &self.blocks {
            y = block.forward(y, context, lora);
        }
        x + match &self.proj_out {
            Projection::Linear(p) => image(p.forward(y, lora)),
            Projection::Conv(p) => p.adapted(image(y), lora),
        }
    }

    /// Its projections where they are convolutions.
    pub fn convolutions(&self) -> Vec<&LayerShape> {
        let mut all = Vec::new();
        for projection in [&self.proj_in, &self.proj_out] {
            if let Projection::Conv(conv) = projection {
                all.push(&conv.shape);
            }
        }
        all
    }

    /// The linear layers that a LoRA can target.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut all = Vec::new();
        for p in [&self.proj_in, &self.proj_out] {
            if let Projection::Linear(linear) = p {
                all.push(linear);
            }
        }
        for b in &self.blocks {
            all.extend(b.attn1.linears());
            all.extend(b.attn2.linears());
            all.extend([&b.ff.input, &b.ff.output]);
        }
        all
    }
}

/// diffusers' `Downsample2D`: a 3x3 convolution of stride 2; without padding the image grows right
/// and below first.
pub struct Downsample {
    pub conv: Conv2d,
    pad: bool,
}

impl Downsample {
    pub fn load(l: &Loader, c: usize, padding: usize) -> Result<Self> {
        let shape = ConvShape { cin: c, cout: c, kernel: 3, stride: 2, padding };
        Ok(Self { conv: Conv2d::load(l, "conv", shape)?, pad: padding == 0 })
    }

    pub fn forward(&self, x: Tensor<4>, lora: Option<&Lora>) -> Tensor<4> {
        let x = if self.pad { x.pad([(0, 0), (0, 1), (0, 1), (0, 0)], 0.0) } else { x };
        self.conv.adapted(x, lora)
    }
}

/// diffusers' `Upsample2D`: nearest neighbour to a given size, then a 3x3 convolution.
pub struct Upsample {
    pub conv: Conv2d,
}

impl Upsample {
    pub fn load(l: &Loader, c: usize) -> Result<Self> {
        Ok(Self { conv: Conv2d::same(l, "conv", c, c)? })
    }

    /// `[B, H, W, C] -> [B, size, C]`; `None` doubles.
    pub fn forward(
        &self,
        x: Tensor<4>,
        size: Option<[usize; 2]>,
        lora: Option<&Lora>,
    ) -> Tensor<4> {
        self.conv.adapted(nearest(x, size), lora)
    }
}

fn nearest(x: Tensor<4>, size: Option<[usize; 2]>) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let [oh, ow] = size.unwrap_or([2 * h, 2 * w]);
    if [oh, ow] == [2 * h, 2 * w] {
        return x.reshape([b, h, 1, w, 1, c]).expand([b, h, 2, w, 2, c]).reshape([b, oh, ow, c]);
    }
    // PyTorch's rule: floor(i * (in / out)) with the ratio in f32.
    let device = x.device();
    let nearest = |from: usize, to: usize| {
        let ratio = from as f32 / to as f32;
        let rows = (0..to).map(|i| ((i as f32 * ratio) as usize).min(from - 1));
        index(&rows.collect::<Vec<usize>>(), &device)
    };
    x.select(1, nearest(h, oh)).select(2, nearest(w, ow))
}

/// diffusers' `Timesteps`: sines and cosines of numbers.
#[derive(Clone, Copy)]
pub struct Waves {
    pub width: usize,
    /// flip_sin_to_cos: cosines first.
    pub flip: bool,
    /// freq_shift
    pub shift: f64,
}

impl Waves {
    /// Numbers -> `[count, width]`. The angles are f32 products, as in PyTorch: at t near 1000
    /// another order of rounding would differ in the fifth digit.
    pub fn of(&self, numbers: &[f32], device: &burn::tensor::Device) -> Tensor<2> {
        let half = self.width / 2;
        let freq = |i: usize| {
            (-(10000f64.ln()) as f32 * i as f32 / (half as f64 - self.shift) as f32).exp()
        };
        let mut rows = Vec::with_capacity(numbers.len() * self.width);
        for t in numbers {
            let angles: Vec<f32> = (0..half).map(|i| t * freq(i)).collect();
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| a.sin_cos()).unzip();
            let (first, second) = if self.flip { (cos, sin) } else { (sin, cos) };
            rows.extend(first.into_iter().chain(second));
            rows.resize(rows.len() + self.width % 2, 0.0);
        }
        Tensor::from_data(TensorData::new(rows, [numbers.len(), self.width]), device)
    }
}

/// diffusers' `TimestepEmbedding` over `Timesteps`.
pub struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    pub waves: Waves,
}

impl TimeEmbedding {
    /// `inputs` are the waves of one number, unless there are those of several, or others beside.
    pub fn load(l: &Loader, waves: Waves, inputs: usize, out: usize) -> Result<Self> {
        Self::load_as(l, ["linear_1", "linear_2"], waves, [inputs, out, out])
    }

    /// The same under other names, with the widths before, between and behind the two layers.
    pub fn load_as(
        l: &Loader,
        names: [&str; 2],
        waves: Waves,
        [inputs, inner, out]: [usize; 3],
    ) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(l, names[0], inputs, inner)?,
            linear_2: Linear::load(l, names[1], inner, out)?,
            waves,
        })
    }

    /// Timesteps, one for each row -> `[B, out]`.
    pub fn forward(&self, timesteps: &[f32], device: &burn::tensor::Device) -> Tensor<2> {
        self.embed(self.waves.of(timesteps, device))
    }

    /// Sines and cosines, and what stands beside them, `[B, inputs]` -> `[B, out]`.
    pub fn embed(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(Activation::Silu.forward(self.linear_1.forward(x, None)), None)
    }
}

/// diffusers' `FeedForward`: GEGLU (Stable Diffusion 1 and 2) or gelu by tanh (the flow models).
pub struct FeedForward {
    pub input: Linear,
    pub output: Linear,
    gated: bool,
}

impl FeedForward {
    pub fn load(l: &Loader, width: usize, gated: bool) -> Result<Self> {
        let inner = 4 * width;
        Ok(Self {
            input: Linear::load(l, "net.0.proj", width, if gated { 2 * inner } else { inner })?,
            output: Linear::load(l, "net.2", inner, width)?,
            gated,
        })
    }

    pub fn forward(&self, x: Tensor<3>, lora: Option<&Lora>) -> Tensor<3> {
        let h = self.input.forward(x, lora);
        let h = if self.gated { geglu(h) } else { Activation::GeluTanh.forward(h) };
        self.output.forward(h, lora)
    }
}
