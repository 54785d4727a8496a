//! transformers' `CLIPTextModel`.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::attention::Attention;
use super::config::Config;
use super::nn::{Activation, LayerNorm, Linear};
use super::weights::{Loader, Storage, Weights};

struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// The text encoder; its output is the last hidden state after the final norm.
pub struct ClipText {
    pub width: usize,
    pub max_tokens: usize,
    pub vocabulary: usize,
    activation: Activation,
    tokens: Tensor<2>,
    positions: Tensor<2>,
    layers: Vec<Layer>,
    norm: LayerNorm,
    device: Device,
}

impl ClipText {
    /// Loads a `text_encoder` folder, with or without the `text_model.` prefix in its keys.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        if let Some(architecture) = c.json["architectures"][0].as_str()
            && !["CLIPTextModel", "CLIPModel"].contains(&architecture)
        {
            bail!(c.bad("architectures", "is not supported; CLIPTextModel is"));
        }
        let width = c.size("hidden_size", 512)?;
        let heads = c.size("num_attention_heads", 8)?;
        ensure!(
            heads > 0 && width % heads == 0,
            c.bad("num_attention_heads", &format!("does not divide hidden_size = {width}"))
        );
        let inner = c.size("intermediate_size", 2048)?;
        let eps = c.float("layer_norm_eps", 1e-5)?;
        let (vocabulary, max_tokens) = (c.size("vocab_size", 49408)?, c.size("max_position_embeddings", 77)?);
        let weights = Weights::open_dir(dir)?;
        let root = Loader::new(&weights, device, storage);
        let root = if weights.has("text_model.final_layer_norm.weight") { root.at("text_model") } else { root };
        let layer = |i: usize| -> Result<Layer> {
            let l = root.at(format!("encoder.layers.{i}"));
            let names = ["q_proj", "k_proj", "v_proj", "out_proj"];
            Ok(Layer {
                norm1: LayerNorm::load(&l, "layer_norm1", width, eps)?,
                attention: Attention::load(&l.at("self_attn"), names, width, width, heads)?,
                norm2: LayerNorm::load(&l, "layer_norm2", width, eps)?,
                fc1: Linear::load(&l, "mlp.fc1", width, inner)?,
                fc2: Linear::load(&l, "mlp.fc2", inner, width)?,
            })
        };
        Ok(Self {
            width,
            max_tokens,
            vocabulary,
            activation: c.activation("hidden_act", "quick_gelu")?,
            tokens: root.tensor("embeddings.token_embedding.weight", [vocabulary, width])?,
            positions: root.tensor("embeddings.position_embedding.weight", [max_tokens, width])?,
            layers: (0..c.size("num_hidden_layers", 12)?).map(layer).collect::<Result<_>>()?,
            norm: LayerNorm::load(&root, "final_layer_norm", width, eps)?,
            device: device.clone(),
        })
    }

    /// Token numbers, one row a prompt, all of one length -> `[B, T, width]`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or a row too long.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor<3>> {
        let (b, t) = (ids.len(), ids[0].len());
        ensure!(t <= self.max_tokens, "the text encoder takes {} tokens, not {t}", self.max_tokens);
        let flat: Vec<i32> = ids.iter().flatten().map(|&i| i as i32).collect();
        ensure!(
            flat.iter().all(|&i| (i as usize) < self.vocabulary),
            "a token is outside the text encoder's vocabulary of {}; do tokenizer and text_encoder belong together?",
            self.vocabulary
        );
        let ids = Tensor::<1, Int>::from_data(TensorData::new(flat, [b * t]), &self.device);
        let positions = self.positions.clone().narrow(0, 0, t).unsqueeze::<3>();
        let mut x = self.tokens.clone().select(0, ids).reshape([b, t, self.width]) + positions;
        let causal: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { -1e30 } else { 0.0 }).collect();
        let causal = Tensor::<4>::from_data(TensorData::new(causal, [1, 1, t, t]), &self.device);
        for layer in &self.layers {
            let y = layer.norm1.forward(x.clone());
            x = x + layer.attention.forward(y, None, Some(causal.clone()), None);
            let y = layer.fc1.forward(layer.norm2.forward(x.clone()), None);
            x = x + layer.fc2.forward(self.activation.forward(y), None);
        }
        Ok(self.norm.forward(x))
    }
}
