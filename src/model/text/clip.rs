//! transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use crate::kernels::rows::rows_of;
use crate::model::attention::Attention;
use crate::model::component::Component;
use crate::model::config::Config;
use crate::model::loader::{Loader, Storage};
use crate::model::nn::{Activation, LayerNorm, Linear};

/// The numbers of a CLIP text encoder.
#[derive(Clone, Debug)]
pub struct ClipConfig {
    pub width: usize,
    pub heads: usize,
    /// Width of the feed-forward.
    pub inner: usize,
    pub layers: usize,
    pub vocabulary: usize,
    pub max_tokens: usize,
    /// Width of the projected output, where there is a projection.
    pub projection: usize,
    pub eps: f64,
    pub activation: Activation,
    /// The end token, or [`LARGEST`].
    pub end: u32,
}

impl ClipConfig {
    /// Reads a text encoder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or not supported.
    pub fn read(c: &Config) -> Result<Self> {
        let projection = c.width("projection_dim", 512)?;
        let classes = ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"];
        if let Some(architecture) = c.json["architectures"][0].as_str()
            && !classes.contains(&architecture)
        {
            let what = "is not supported; CLIPTextModel and CLIPTextModelWithProjection are";
            bail!(c.bad("architectures", what));
        }
        Self::of(c, projection)
    }

    /// Of the fields of a text encoder, alone or in a dual encoder's configuration.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn of(c: &Config, projection: usize) -> Result<Self> {
        let width = c.width("hidden_size", 512)?;
        Ok(Self {
            width,
            heads: c.heads("num_attention_heads", 8, width)?,
            inner: c.width("intermediate_size", 2048)?,
            layers: c.count("num_hidden_layers", 12)?,
            vocabulary: c.width("vocab_size", 49408)?,
            max_tokens: c.width("max_position_embeddings", 77)?,
            projection,
            eps: c.positive("layer_norm_eps", 1e-5)?,
            activation: c.activation("hidden_act", "quick_gelu")?,
            end: c.size("eos_token_id", 49407)? as u32,
        })
    }
}

/// What the parts of a layer are called.
pub struct LayerNames {
    pub norm1: &'static str,
    pub attention: &'static str,
    /// Of query, key, value and output.
    pub projections: [&'static str; 4],
    pub norm2: &'static str,
}

/// CLIP's, in transformers.
pub const CLIP_LAYER: LayerNames = LayerNames {
    norm1: "layer_norm1",
    attention: "self_attn",
    projections: ["q_proj", "k_proj", "v_proj", "out_proj"],
    norm2: "layer_norm2",
};

/// A transformer layer with its norms in front, of a text or an image encoder.
pub struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Layer {
    /// # Errors
    /// Names the tensor that is missing or of the wrong shape.
    pub fn load(
        l: &Loader,
        names: &LayerNames,
        [width, inner]: [usize; 2],
        heads: usize,
        eps: f64,
    ) -> Result<Self> {
        let LayerNames { norm1, attention, projections, norm2 } = names;
        Ok(Self {
            norm1: LayerNorm::load(l, norm1, width, eps)?,
            attention: Attention::load(&l.at(attention), *projections, width, width, heads)?,
            norm2: LayerNorm::load(l, norm2, width, eps)?,
            fc1: Linear::load(l, "mlp.fc1", width, inner)?,
            fc2: Linear::load(l, "mlp.fc2", inner, width)?,
        })
    }

    /// `[B, T, width]`; `bias` `[1, 1, T, T]` is added to the scores.
    pub fn forward(&self, x: Tensor<3>, bias: Option<Tensor<4>>, act: Activation) -> Tensor<3> {
        let y = self.norm1.forward(x.clone());
        let x = x + self.attention.forward(y, None, bias, None);
        let y = self.fc1.forward(self.norm2.forward(x.clone()), None);
        x + self.fc2.forward(act.forward(y), None)
    }
}

/// What the encoder makes of prompts.
pub struct ClipOutput {
    /// The last hidden state after the final norm, `[B, T, width]`: Stable Diffusion 1 and 2's
    /// sequence.
    pub last: Tensor<3>,
    /// The hidden state before the last layer, not normalised: Stable Diffusion 3's sequence.
    pub penultimate: Tensor<3>,
    /// The last hidden state at the end token, projected where the model has a projection, `[B,
    /// P]`.
    pub pooled: Tensor<2>,
}

/// A text encoder.
pub struct ClipText {
    pub width: usize,
    pub max_tokens: usize,
    pub vocabulary: usize,
    activation: Activation,
    tokens: Tensor<2>,
    positions: Tensor<2>,
    layers: Vec<Layer>,
    norm: LayerNorm,
    projection: Option<Linear>,
    end: u32,
    device: Device,
}

/// The end token of configs from before transformers fixed it: there the pooled position is that of
/// the largest token, as always in open_clip.
pub const LARGEST: u32 = 2;

impl ClipText {
    /// Loads a `text_encoder`, with or without the `text_model.` prefix in its keys.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(part: &Component, device: &Device, storage: Storage) -> Result<Self> {
        let c = ClipConfig::read(&part.config)?;
        let weights = part.weights()?;
        Self::of(&Loader::new(&weights, device, storage), &c)
    }

    /// Of the tensors of a text encoder, alone or in a dual encoder.
    ///
    /// # Errors
    /// Names the tensor that is missing or of the wrong shape.
    pub fn of(outer: &Loader, c: &ClipConfig) -> Result<Self> {
        let projection = if outer.has("text_projection.weight") {
            Some(Linear::load(outer, "text_projection", c.width, c.projection)?)
        } else {
            None
        };
        let prefixed = outer.has("text_model.final_layer_norm.weight");
        let root = if prefixed { outer.at("text_model") } else { outer.clone() };
        let layer = |i: usize| {
            let place = root.at(format!("encoder.layers.{i}"));
            Layer::load(&place, &CLIP_LAYER, [c.width, c.inner], c.heads, c.eps)
        };
        let tokens = "embeddings.token_embedding.weight";
        let positions = "embeddings.position_embedding.weight";
        Ok(Self {
            width: c.width,
            max_tokens: c.max_tokens,
            vocabulary: c.vocabulary,
            activation: c.activation,
            tokens: root.tensor(tokens, [c.vocabulary, c.width])?,
            positions: root.tensor(positions, [c.max_tokens, c.width])?,
            layers: (0..c.layers).map(layer).collect::<Result<_>>()?,
            norm: LayerNorm::load(&root, "final_layer_norm", c.width, c.eps)?,
            projection,
            end: c.end,
            device: outer.device.clone(),
        })
    }

    /// Width of the pooled output.
    pub fn pooled_width(&self) -> usize {
        self.projection.as_ref().map_or(self.width, |p| p.shape.outputs)
    }

    /// Token numbers, one row a prompt, all of one length.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or a row too long.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<ClipOutput> {
        let (b, t) = (ids.len(), ids[0].len());
        ensure!(t <= self.max_tokens, "the text encoder takes {} tokens, not {t}", self.max_tokens);
        let flat: Vec<usize> = ids.iter().flatten().map(|&i| i as usize).collect();
        ensure!(
            flat.iter().all(|&i| i < self.vocabulary),
            "a token is outside the text encoder's vocabulary of {}; do tokenizer and text_encoder \
             belong together?",
            self.vocabulary
        );
        let ends: Vec<usize> = ids.iter().map(|row| self.end_of(row)).collect();
        let positions = self.positions.clone().narrow(0, 0, t).unsqueeze::<3>();
        let mut x = rows_of(&self.tokens, &flat).reshape([b, t, self.width]) + positions;
        let causal: Vec<f32> =
            (0..t * t).map(|i| if i % t > i / t { -1e30 } else { 0.0 }).collect();
        let causal = Tensor::<4>::from_data(TensorData::new(causal, [1, 1, t, t]), &self.device);
        let mut penultimate = x.clone();
        for layer in &self.layers {
            penultimate = x.clone();
            x = layer.forward(x, Some(causal.clone()), self.activation);
        }
        let last = self.norm.forward(x);
        let rows = ends
            .iter()
            .enumerate()
            .map(|(row, &at)| last.clone().narrow(0, row, 1).narrow(1, at, 1));
        let pooled = Tensor::cat(rows.collect(), 0).squeeze_dim::<2>(1);
        let pooled = match &self.projection {
            Some(projection) => projection.forward(pooled, None),
            None => pooled,
        };
        Ok(ClipOutput { last, penultimate, pooled })
    }

    /// Where a row's end token is, as transformers finds it.
    fn end_of(&self, row: &[u32]) -> usize {
        if self.end == LARGEST {
            let largest = row.iter().max().copied().unwrap_or_default();
            return row.iter().position(|&i| i == largest).unwrap_or_default();
        }
        row.iter().position(|&i| i == self.end).unwrap_or_default()
    }
}
