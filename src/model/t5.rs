//! transformers' `T5EncoderModel`, with plain or gated feed-forward (T5 1.0, T5 1.1 as in SD3 and FLUX).
//!
//! T5-XXL is larger than the models it serves, and is needed once a prompt. Its layers are therefore never held
//! together: each is read from the file, run on all prompts, and dropped.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};

use super::config::Config;
use super::nn::{Activation, Linear, RmsNorm};
use super::weights::{Loader, Storage, Weights};

/// The encoder's file and numbers.
pub struct T5Encoder {
    pub width: usize,
    weights: Weights,
    device: Device,
    storage: Storage,
    heads: usize,
    /// Width of a head, which need not be width / heads.
    head: usize,
    inner: usize,
    layers: usize,
    eps: f64,
    buckets: usize,
    max_distance: usize,
    vocabulary: usize,
    gated: bool,
    activation: Activation,
}

impl T5Encoder {
    /// Opens a text encoder's folder; nothing is read but the configuration and the list of tensors.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn open(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        if let Some(architecture) = c.json["architectures"][0].as_str()
            && !["T5EncoderModel", "T5ForConditionalGeneration", "T5Model"].contains(&architecture)
        {
            bail!(c.bad("architectures", "is not supported; T5EncoderModel is"));
        }
        let (gated, activation) = match c.text("feed_forward_proj", "relu")?.as_str() {
            "relu" => (false, Activation::Relu),
            "gated-gelu" => (true, Activation::GeluTanh),
            "gated-silu" => (true, Activation::Silu),
            _ => bail!(c.bad("feed_forward_proj", "is not supported; relu, gated-gelu and gated-silu are")),
        };
        Ok(Self {
            width: c.size("d_model", 512)?,
            weights: Weights::open_dir(dir)?,
            device: device.clone(),
            storage,
            heads: c.size("num_heads", 8)?,
            head: c.size("d_kv", 64)?,
            inner: c.size("d_ff", 2048)?,
            layers: c.size("num_layers", 6)?,
            eps: c.float("layer_norm_epsilon", 1e-6)?,
            buckets: c.size("relative_attention_num_buckets", 32)?,
            max_distance: c.size("relative_attention_max_distance", 128)?,
            vocabulary: c.size("vocab_size", 32128)?,
            gated,
            activation,
        })
    }

    /// Token numbers, one row a prompt, all of one length -> the last hidden state, `[B, T, width]`. Padding is attended
    /// to, as diffusers' pipelines do.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, or a tensor is missing or of the wrong shape.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor<3>> {
        let (b, t) = (ids.len(), ids[0].len());
        let root = Loader::new(&self.weights, &self.device, self.storage);
        let mut x = self.embed(ids)?;
        let attention = |i: usize| root.at(format!("encoder.block.{i}.layer.0.SelfAttention"));
        let table = attention(0).at("relative_attention_bias").tensor("weight", [self.buckets, self.heads])?;
        let bias = self.position_bias(&table, t);
        let inner = self.heads * self.head;
        for i in 0..self.layers {
            let (l, block) = (attention(i), root.at(format!("encoder.block.{i}")));
            let h = RmsNorm::load(&block, "layer.0.layer_norm", self.width, self.eps)?.forward(x.clone());
            let project = |part: &str| Linear::load(&l, part, self.width, inner).map(|p| p.forward(h.clone(), None));
            let split = |y: Tensor<3>| y.reshape([b, t, self.heads, self.head]).swap_dims(1, 2);
            let (q, k, v) = (split(project("q")?), split(project("k")?), split(project("v")?));
            // T5 does not scale its scores.
            let scores = q.matmul(k.swap_dims(2, 3)) + bias.clone();
            let y = activation::softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([b, t, inner]);
            x = x + Linear::load(&l, "o", inner, self.width)?.forward(y, None);
            let h = RmsNorm::load(&block, "layer.1.layer_norm", self.width, self.eps)?.forward(x.clone());
            let l = block.at("layer.1.DenseReluDense");
            let up = |part: &str| Linear::load(&l, part, self.width, self.inner).map(|p| p.forward(h.clone(), None));
            let h = match self.gated {
                true => self.activation.forward(up("wi_0")?) * up("wi_1")?,
                false => self.activation.forward(up("wi")?),
            };
            x = x + Linear::load(&l, "wo", self.inner, self.width)?.forward(h, None);
        }
        Ok(RmsNorm::load(&root, "encoder.final_layer_norm", self.width, self.eps)?.forward(x))
    }

    /// Rows of the embedding, picked on the host: the whole table would be the largest tensor of all.
    fn embed(&self, ids: &[Vec<u32>]) -> Result<Tensor<3>> {
        let name = if self.weights.has("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
        let mut rows = Vec::with_capacity(ids.len() * ids[0].len() * self.width);
        for &id in ids.iter().flatten() {
            ensure!(
                (id as usize) < self.vocabulary,
                "token {id} is outside the text encoder's vocabulary of {}; do tokenizer and text encoder belong together?",
                self.vocabulary
            );
            rows.extend(self.weights.row(name, id as usize, &[self.width])?);
        }
        Ok(Tensor::from_data(TensorData::new(rows, [ids.len(), ids[0].len(), self.width]), &self.device))
    }

    /// What each head adds to the scores for the distance of two tokens, `[1, heads, T, T]`.
    fn position_bias(&self, table: &Tensor<2>, t: usize) -> Tensor<4> {
        let bucket = |i: usize| self.bucket((i % t) as i64 - (i / t) as i64);
        let index: Vec<i32> = (0..t * t).map(|i| bucket(i) as i32).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [t * t]), &self.device);
        table.clone().select(0, index).reshape([1, t, t, self.heads]).permute([0, 3, 1, 2])
    }

    /// Half of the buckets for each direction; in each, half exact and half logarithmic up to the largest distance.
    fn bucket(&self, distance: i64) -> usize {
        let half = self.buckets / 2;
        let (offset, d) = (if distance > 0 { half } else { 0 }, distance.unsigned_abs() as usize);
        let exact = half / 2;
        if d < exact {
            return offset + d;
        }
        // In f32 as in PyTorch: a bucket's edge may fall on a whole number.
        let span = (self.max_distance as f64 / exact as f64).ln() as f32;
        let far = exact + ((d as f32 / exact as f32).ln() / span * (half - exact) as f32) as usize;
        offset + far.min(half - 1)
    }
}
