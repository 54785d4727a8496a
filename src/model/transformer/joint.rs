//! What diffusers' SD3Transformer2DModel, FluxTransformer2DModel and Flux2Transformer2DModel share:
//! joint attention over text and image tokens, modulation by time and text, and the embedding that
//! modulates.

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};

use super::rotary::{Turns, rotate};
use crate::kernels::attention::{Heads, attention};
use crate::kernels::layer_norm::layer_norm;
use crate::lora::Lora;
use crate::model::blocks::{TimeEmbedding, Waves};
use crate::model::conditioning::Conditioning;
use crate::model::config::{BlockShape, NetworkConfig};
use crate::model::denoiser::{Fixed, Hidden, Inputs};
use crate::model::loader::Loader;
use crate::model::nn::{Activation, Linear, RmsNorm};
use crate::model::reference::ReferenceTensors;
use crate::model::row_map::RowMap;

/// The sinusoidal embedding of time and guidance.
pub const WAVES: Waves = Waves { width: 256, flip: true, shift: 0.0 };

/// Tokens as `Hidden` holds them: with one dimension more.
pub fn hold(tokens: Tensor<3>) -> Tensor<4> {
    tokens.unsqueeze_dim(1)
}

/// The reverse of [`hold`].
pub fn tokens(held: Tensor<4>) -> Tensor<3> {
    held.squeeze_dim(1)
}

/// Image and text tokens as one stream, text first, as single blocks have it from the first of them
/// on.
pub fn one_stream(mut flow: Vec<Tensor<4>>) -> Tensor<3> {
    if flow.len() == 2 {
        flow.swap(0, 1);
    }
    tokens(Tensor::cat(flow, 2))
}

/// What stands behind the last block: the prediction of its last `n` tokens, `[B, n, C]`, which are
/// the image's.
pub fn predicted(
    mut hidden: Hidden,
    n: usize,
    norm_out: &Modulation,
    proj_out: &Linear,
) -> Tensor<3> {
    let first = tokens(hidden.flow.swap_remove(0));
    let total = first.dims()[1];
    let image = first.narrow(1, total - n, n);
    let shift = norm_out.continuous(&hidden.fixed, None);
    proj_out.forward(shift.norm(image), None)
}

/// What the forward of a class takes whose tokens are packed and have positions of `N` numbers.
pub struct PackedReference<const N: usize> {
    /// `[B, S, C]`
    pub packed: Tensor<3>,
    pub cond: Conditioning,
    pub image_ids: Vec<[f32; N]>,
    pub text_ids: Vec<[f32; N]>,
    /// One an image, 0..1000; in the file they are 0..1.
    pub timesteps: Vec<f32>,
    /// One an image, where the file has it.
    pub guidance: Option<Vec<f32>>,
}

impl<const N: usize> PackedReference<N> {
    /// Reads them for a network whose tokens have so many channels.
    ///
    /// # Errors
    /// When an input is missing or does not fit the network.
    pub fn read(
        inputs: &ReferenceTensors,
        network: &dyn NetworkConfig,
        token: usize,
    ) -> Result<Self> {
        let packed = inputs.tensor::<3>("in.hidden_states")?;
        let [rows, n, channels] = packed.dims();
        ensure!(
            channels == token,
            "{}: in.hidden_states has tokens of {channels} channels, the network takes {token}",
            inputs.path().display()
        );
        let cond = inputs.conditioning(rows, network)?;
        let ids = |name: &str, count: usize| -> Result<Vec<[f32; N]>> {
            Ok(inputs.values(name, N * count)?.as_chunks().0.to_vec())
        };
        let (image_ids, text_ids) =
            (ids("in.img_ids", n)?, ids("in.txt_ids", cond.sequence.dims()[1])?);
        let times = inputs.values("in.timestep", rows)?;
        let given = inputs.has("in.guidance");
        Ok(Self {
            packed,
            cond,
            image_ids,
            text_ids,
            timesteps: times.iter().map(|t| 1000.0 * t).collect(),
            guidance: given.then(|| inputs.values("in.guidance", rows)).transpose()?,
        })
    }
}

/// diffusers' `CombinedTimestepTextProjEmbeddings`, and the variant with an embedding of the
/// guidance scale.
pub struct TimeTextEmbedding {
    time: TimeEmbedding,
    guidance: Option<TimeEmbedding>,
    text: [Linear; 2],
    device: Device,
}

impl TimeTextEmbedding {
    pub fn load(l: &Loader, width: usize, pooled: usize, guided: bool) -> Result<Self> {
        let embedding = |part: &str| TimeEmbedding::load(&l.at(part), WAVES, WAVES.width, width);
        Ok(Self {
            time: embedding("timestep_embedder")?,
            guidance: if guided { Some(embedding("guidance_embedder")?) } else { None },
            text: [
                Linear::load(l, "text_embedder.linear_1", pooled, width)?,
                Linear::load(l, "text_embedder.linear_2", width, width)?,
            ],
            device: l.device.clone(),
        })
    }

    /// `[P, width]`, one a condition, activated: every modulation activates it first, so it is done
    /// once here.
    pub fn forward(&self, inputs: &Inputs) -> Tensor<2> {
        let pooled =
            inputs.cond.pooled.clone().expect("a transformer's conditioning has a pooled part");
        let mut sum = self.time.forward(inputs.timesteps, &self.device);
        if let Some(embedding) = &self.guidance {
            let scaled: Vec<f32> = inputs.guidance.iter().map(|g| 1000.0 * g).collect();
            sum = sum + embedding.forward(&scaled, &self.device);
        }
        let [first, second] = &self.text;
        let silu = |x| Activation::Silu.forward(x);
        silu(sum + second.forward(silu(first.forward(pooled, None)), None))
    }
}

/// eps of every modulated norm.
const NORM_EPS: f64 = 1e-6;

/// What one layer norm is modulated with, `[B, width]` each.
pub struct Shift {
    shift: Tensor<2>,
    /// 1 + scale.
    factor: Tensor<2>,
    /// One and zero of a width, where an adapter is on the layer that shift and scale come from:
    /// the kernel holds what it modulates with constant.
    plain: Option<[Tensor<2>; 2]>,
}

impl Shift {
    /// LayerNorm(x) (1 + scale) + shift, over tokens `[B, T, width]`.
    pub fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        let (factor, shift) = (self.factor.clone(), self.shift.clone());
        match &self.plain {
            None => layer_norm(x, factor, shift, NORM_EPS),
            Some([one, zero]) => {
                layer_norm(x, one.clone(), zero.clone(), NORM_EPS) * factor.unsqueeze_dim::<3>(1)
                    + shift.unsqueeze_dim::<3>(1)
            }
        }
    }
}

/// A modulation and the gate of what it feeds, `[B, 1, width]`.
pub struct Gated {
    pub shift: Shift,
    pub gate: Tensor<3>,
}

impl Gated {
    /// Of a modulation that blocks share, `[P, parts width]`: (shift, scale, gate) over and over.
    pub fn shared(modulation: &Tensor<2>, width: usize, rows: &RowMap) -> Vec<Self> {
        let parts = modulation.dims()[1] / width;
        let mut parts = rows.spread(modulation.clone()).chunk(parts, 1).into_iter();
        let mut gated = Vec::new();
        while let (Some(shift), Some(scale), Some(gate)) =
            (parts.next(), parts.next(), parts.next())
        {
            let shift = Shift { shift, factor: scale + 1.0, plain: None };
            gated.push(Self { shift, gate: gate.unsqueeze_dim(1) });
        }
        gated
    }
}

/// A layer norm whose scale, shift and gates come from time and text: diffusers' `AdaLayerNormZero`
/// and its relatives.
pub struct Modulation {
    linear: Linear,
    /// One and zero, `[1, width]`.
    plain: [Tensor<2>; 2],
    parts: usize,
}

impl Modulation {
    /// `parts` vectors of `width`, by the linear layer of module `part`.
    pub fn load(l: &Loader, part: &str, width: usize, parts: usize) -> Result<Self> {
        Ok(Self {
            linear: Linear::load(&l.at(part), "linear", width, parts * width)?,
            plain: [Tensor::ones([1, width], l.device), Tensor::zeros([1, width], l.device)],
            parts,
        })
    }

    fn parts(&self, fixed: &Fixed, lora: Option<&Lora>) -> impl Iterator<Item = Tensor<2>> {
        let few = self.linear.forward(fixed.time.clone(), lora);
        fixed.cond.rows.spread(few).chunk(self.parts, 1).into_iter()
    }

    fn shift(&self, shift: Tensor<2>, scale: Tensor<2>, lora: Option<&Lora>) -> Shift {
        let adapted = lora.is_some_and(|l| l.get(&self.linear.shape.name).is_some());
        Shift { shift, factor: scale + 1.0, plain: adapted.then(|| self.plain.clone()) }
    }

    /// The parts of `AdaLayerNormZero` and its relatives: (shift, scale, gate) over and over.
    pub fn gated(&self, fixed: &Fixed, lora: Option<&Lora>) -> Vec<Gated> {
        let mut parts = self.parts(fixed, lora);
        let mut gated = Vec::new();
        while let (Some(shift), Some(scale), Some(gate)) =
            (parts.next(), parts.next(), parts.next())
        {
            let shift = self.shift(shift, scale, lora);
            gated.push(Gated { shift, gate: gate.unsqueeze_dim(1) });
        }
        gated
    }

    /// The two parts of `AdaLayerNormContinuous`, which has the scale first.
    pub fn continuous(&self, fixed: &Fixed, lora: Option<&Lora>) -> Shift {
        let mut parts = self.parts(fixed, lora);
        let (scale, shift) = parts.next().zip(parts.next()).expect("a scale and a shift");
        self.shift(shift, scale, lora)
    }

    pub fn linear(&self) -> &Linear {
        &self.linear
    }
}

/// Whether a stream's attention ends in a projection.
#[derive(Clone, Copy, PartialEq)]
pub enum Output {
    Projected,
    Plain,
}

/// Projections of one stream of tokens, with their norms.
struct Stream {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Option<Linear>,
    norms: Option<[RmsNorm; 2]>,
}

/// Names of a stream's parts.
struct Names {
    projections: [&'static str; 3],
    out: &'static str,
    norms: [&'static str; 2],
}

const IMAGE: Names =
    Names { projections: ["to_q", "to_k", "to_v"], out: "to_out.0", norms: ["norm_q", "norm_k"] };
const TEXT: Names = Names {
    projections: ["add_q_proj", "add_k_proj", "add_v_proj"],
    out: "to_add_out",
    norms: ["norm_added_q", "norm_added_k"],
};

impl Stream {
    fn load(l: &Loader, names: &Names, spec: JointSpec, out: Output) -> Result<Self> {
        let linear = |name: &str| Linear::load(l, name, spec.width, spec.width);
        let [q, k, v] = names.projections;
        let norm = |name: &str| RmsNorm::load(l, name, spec.width / spec.heads, 1e-6);
        Ok(Self {
            q: linear(q)?,
            k: linear(k)?,
            v: linear(v)?,
            out: match out {
                Output::Projected => Some(linear(names.out)?),
                Output::Plain => None,
            },
            norms: if spec.qk_norm {
                Some([norm(names.norms[0])?, norm(names.norms[1])?])
            } else {
                None
            },
        })
    }

    /// q, k and v, `[B, T, heads, head]`.
    fn heads(&self, x: Tensor<3>, heads: usize, lora: Option<&Lora>) -> [Tensor<4>; 3] {
        let [b, t, width] = x.dims();
        let split = |y: Tensor<3>| y.reshape([b, t, heads, width / heads]);
        let (q, k) =
            (split(self.q.forward(x.clone(), lora)), split(self.k.forward(x.clone(), lora)));
        let v = split(self.v.forward(x, lora));
        match &self.norms {
            Some([nq, nk]) => [nq.forward(q), nk.forward(k), v],
            None => [q, k, v],
        }
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.q, &self.k, &self.v].into_iter().chain(&self.out)
    }
}

/// The shape of a block over `tokens` of `width`.
pub fn block_shape(tokens: usize, width: usize, heads: usize) -> BlockShape {
    let (n, width) = (tokens as f64, width as f64);
    let stream = n * width;
    let scores = heads as f64 * n * n;
    BlockShape { input: stream, stream, wide: 4.0 * stream, scores, depth: 1.0 }
}

/// How a [`JointAttention`] is built.
#[derive(Clone, Copy)]
pub struct JointSpec {
    pub width: usize,
    pub heads: usize,
    pub qk_norm: bool,
}

/// diffusers' `Attention` with `JointAttnProcessor2_0`, and `FluxAttention`: one attention over
/// text and image tokens that each have their own projections.
pub struct JointAttention {
    heads: usize,
    image: Stream,
    text: Option<Stream>,
}

impl JointAttention {
    /// Attention over image tokens, and over text tokens where these have projections of their own.
    pub fn load(l: &Loader, spec: JointSpec, image: Output, text: Option<Output>) -> Result<Self> {
        let text = text.map(|out| Stream::load(l, &TEXT, spec, out));
        Ok(Self {
            heads: spec.heads,
            image: Stream::load(l, &IMAGE, spec, image)?,
            text: text.transpose()?,
        })
    }

    /// Image tokens `[B, S, width]` and text tokens `[B, T, width]` attend to each other, text
    /// before image, which matters to the rotary embedding only.
    pub fn forward(
        &self,
        image: Tensor<3>,
        text: Option<Tensor<3>>,
        rotary: Option<&Turns>,
        lora: Option<&Lora>,
    ) -> (Tensor<3>, Option<Tensor<3>>) {
        let [b, _, width] = image.dims();
        let t = text.as_ref().map_or(0, |text| text.dims()[1]);
        let mut parts = self.image.heads(image, self.heads, lora);
        if let (Some(stream), Some(text)) = (&self.text, text) {
            let own = stream.heads(text, self.heads, lora);
            let mut own = own.into_iter();
            parts =
                parts.map(|image| Tensor::cat(vec![own.next().expect("three parts"), image], 1));
        }
        let [q, k, v] = parts;
        let (q, k) = match rotary {
            Some(rotary) => (rotate(q, rotary), rotate(k, rotary)),
            None => (q, k),
        };
        let total = q.dims()[1];
        let [q, k, v] = [q, k, v].map(|x| x.reshape([b, total, width]));
        let y = attention(q, k, v, None, Heads::of(self.heads, width));
        let project = |stream: &Stream, y: Tensor<3>| match &stream.out {
            Some(out) => out.forward(y, lora),
            None => y,
        };
        match &self.text {
            Some(stream) if t > 0 => {
                let text = project(stream, y.clone().narrow(1, 0, t));
                (project(&self.image, y.narrow(1, t, total - t)), Some(text))
            }
            _ => (project(&self.image, y), None),
        }
    }

    /// The layers that a LoRA can target.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.image.linears().chain(self.text.iter().flat_map(Stream::linears))
    }
}
