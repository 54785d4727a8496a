//! transformers' `T5EncoderModel`, with plain or gated feed-forward (T5 1.0, T5 1.1 as in SD3 and
//! FLUX).
//!
//! T5-XXL is larger than the models it serves, and is needed once a prompt. Its layers are
//! therefore never held together: each is read from the file, run on all prompts, and dropped.

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};

use crate::device::tensor::{read, upload};
use crate::io::weights::Weights;
use crate::kernels::attention::{Heads, attention};
use crate::kernels::rows::rows_of;
use crate::model::component::Component;
use crate::model::config::Config;
use crate::model::loader::{Loader, Storage};
use crate::model::nn::{Activation, Linear, RmsNorm};

/// The numbers of a T5 encoder.
#[derive(Clone, Debug)]
pub struct T5Config {
    pub width: usize,
    pub heads: usize,
    /// Width of a head, which need not be width / heads.
    pub head: usize,
    /// Width of the feed-forward.
    pub inner: usize,
    pub layers: usize,
    pub vocabulary: usize,
    eps: f64,
    buckets: usize,
    max_distance: usize,
    gated: bool,
    activation: Activation,
}

impl T5Config {
    /// Reads a text encoder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or not supported.
    pub fn read(c: &Config) -> Result<Self> {
        if let Some(architecture) = c.json["architectures"][0].as_str()
            && !["T5EncoderModel", "T5ForConditionalGeneration", "T5Model"].contains(&architecture)
        {
            bail!(c.bad("architectures", "is not supported; T5EncoderModel is"));
        }
        let (gated, activation) = match c.text("feed_forward_proj", "relu")?.as_str() {
            "relu" => (false, Activation::Relu),
            "gated-gelu" => (true, Activation::GeluTanh),
            "gated-silu" => (true, Activation::Silu),
            _ => bail!(
                c.bad("feed_forward_proj", "is not supported; relu, gated-gelu and gated-silu are")
            ),
        };
        let buckets = c.count("relative_attention_num_buckets", 32)?;
        ensure!(buckets >= 4, c.bad("relative_attention_num_buckets", "must be at least 4"));
        Ok(Self {
            width: c.width("d_model", 512)?,
            heads: c.count("num_heads", 8)?,
            head: c.width("d_kv", 64)?,
            inner: c.width("d_ff", 2048)?,
            layers: c.count("num_layers", 6)?,
            vocabulary: c.width("vocab_size", 32128)?,
            eps: c.float("layer_norm_epsilon", 1e-6)?,
            buckets,
            max_distance: c.width("relative_attention_max_distance", 128)?,
            gated,
            activation,
        })
    }

    /// Half of the buckets for each direction; in each, half exact and half logarithmic up to the
    /// largest distance.
    fn bucket(&self, distance: i64) -> usize {
        let half = self.buckets / 2;
        let d = distance.unsigned_abs() as usize;
        let offset = if distance > 0 { half } else { 0 };
        let exact = half / 2;
        if d < exact {
            return offset + d;
        }
        // In f32 as in PyTorch: a bucket's edge may fall on a whole number.
        let span = (self.max_distance as f64 / exact as f64).ln() as f32;
        let far = (d as f32 / exact as f32).ln() / span * (half - exact) as f32;
        offset + (exact + far as usize).min(half - 1)
    }
}

/// The encoder's file and numbers.
pub struct T5Encoder {
    pub config: T5Config,
    pub width: usize,
    weights: Weights,
    device: Device,
    storage: Storage,
}

/// One layer's weights.
struct Layer {
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm2: RmsNorm,
    /// The gate, where there is one, then the feed-forward's first product.
    up: Vec<Linear>,
    down: Linear,
}

impl Layer {
    fn load(root: &Loader, c: &T5Config, i: usize) -> Result<Self> {
        let block = root.at(format!("encoder.block.{i}"));
        let (attention, ff) =
            (block.at("layer.0.SelfAttention"), block.at("layer.1.DenseReluDense"));
        let inner = c.heads * c.head;
        let project = |part: &str| Linear::load(&attention, part, c.width, inner);
        let up: &[&str] = if c.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        Ok(Self {
            norm1: RmsNorm::load(&block, "layer.0.layer_norm", c.width, c.eps)?,
            q: project("q")?,
            k: project("k")?,
            v: project("v")?,
            o: Linear::load(&attention, "o", inner, c.width)?,
            norm2: RmsNorm::load(&block, "layer.1.layer_norm", c.width, c.eps)?,
            up: up
                .iter()
                .map(|part| Linear::load(&ff, part, c.width, c.inner))
                .collect::<Result<_>>()?,
            down: Linear::load(&ff, "wo", c.inner, c.width)?,
        })
    }

    /// `[B, T, width]`, with what each head adds to its scores, `[1, heads, T, T]`.
    fn forward(&self, c: &T5Config, x: Tensor<3>, bias: &Tensor<4>) -> Tensor<3> {
        let h = self.norm1.forward(x.clone());
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|l| l.forward(h.clone(), None));
        // T5 does not scale its scores.
        let y = attention(q, k, v, Some(bias.clone()), Heads { heads: c.heads, scale: 1.0 });
        let x = x + self.o.forward(y, None);
        let h = self.norm2.forward(x.clone());
        let first = c.activation.forward(self.up[0].forward(h.clone(), None));
        let h = match self.up.get(1) {
            Some(second) => first * second.forward(h, None),
            None => first,
        };
        x + self.down.forward(h, None)
    }
}

impl T5Encoder {
    /// Opens a text encoder; nothing is read but the configuration and the list of tensors.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn open(part: &Component, device: &Device, storage: Storage) -> Result<Self> {
        let config = T5Config::read(&part.config)?;
        let weights = part.weights()?;
        Ok(Self { width: config.width, config, weights, device: device.clone(), storage })
    }

    /// Token numbers, one row a prompt, all of one length -> the last hidden state,
    /// `[N, T, width]`, on the host. Each layer is read once, and run on one prompt after the
    /// other. Padding is attended to, as diffusers' pipelines do.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, or a tensor is missing or of the wrong shape.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Vec<f32>> {
        let (c, t) = (&self.config, ids.first().map_or(0, Vec::len));
        let root = Loader::new(&self.weights, &self.device, self.storage);
        let mut hidden: Vec<Vec<f32>> =
            ids.iter().map(|prompt| self.embed(prompt)).collect::<Result<_>>()?;
        let table = root.at("encoder.block.0.layer.0.SelfAttention.relative_attention_bias");
        let bias = self.position_bias(&table.tensor("weight", [c.buckets, c.heads])?, t);
        let each = |hidden: &mut Vec<Vec<f32>>, run: &dyn Fn(Tensor<3>) -> Tensor<3>| {
            for prompt in hidden {
                *prompt = read(&run(upload(prompt, [1, t, c.width], &self.device)))?;
            }
            anyhow::Ok(())
        };
        for i in 0..c.layers {
            let layer = Layer::load(&root, c, i)?;
            each(&mut hidden, &|x| layer.forward(c, x, &bias))?;
        }
        let norm = RmsNorm::load(&root, "encoder.final_layer_norm", c.width, c.eps)?;
        each(&mut hidden, &|x| norm.forward(x))?;
        Ok(hidden.concat())
    }

    /// Rows of the embedding, picked on the host: the whole table would be the largest tensor of
    /// all.
    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let shared = self.weights.has("shared.weight");
        let name = if shared { "shared.weight" } else { "encoder.embed_tokens.weight" };
        let vocabulary = self.config.vocabulary;
        let mut rows = Vec::new();
        for &id in ids {
            ensure!(
                (id as usize) < vocabulary,
                "token {id} is outside the text encoder's vocabulary of {vocabulary}; do tokenizer \
                 and text encoder belong together?"
            );
            rows.extend(self.weights.row(name, id as usize, &[self.width])?);
        }
        Ok(rows)
    }

    /// What each head adds to the scores for the distance of two tokens, `[1, heads, T, T]`.
    fn position_bias(&self, table: &Tensor<2>, t: usize) -> Tensor<4> {
        let bucket = |i: usize| self.config.bucket((i % t) as i64 - (i / t) as i64);
        let rows = rows_of(table, &(0..t * t).map(bucket).collect::<Vec<usize>>());
        rows.reshape([1, t, t, self.config.heads]).permute([0, 3, 1, 2])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    /// Each layer is read once, however many prompts there are, and every prompt's rows are those
    /// that it has alone.
    #[test]
    fn layers_are_read_once_for_all_prompts() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/sd3/text_encoder_3");
        let open = || {
            T5Encoder::open(&Component::folder(&dir).unwrap(), &Device::flex(), Storage::F32)
                .unwrap()
        };
        let (tokens, prompts) = (6, 35);
        let row = |i: usize| (0..tokens).map(|j| ((7 * i + 3 * j) % 50) as u32).collect();
        let ids: Vec<Vec<u32>> = (0..prompts).map(row).collect();
        let t5 = open();
        let all = t5.forward(&ids).unwrap();
        // A row of the table for each token, and every other tensor once.
        let layers = t5.weights.names().filter(|n| !n.contains("shared")).count();
        let embedded = t5.weights.names().filter(|n| n.contains("embed_tokens")).count();
        let reads = t5.weights.reads.load(Ordering::Relaxed);
        assert_eq!(reads, tokens * prompts + layers - embedded, "of {layers} tensors");
        let alone = open().forward(&ids[20..21]).unwrap();
        assert!(all[20 * alone.len()..21 * alone.len()] == alone, "the bits depend on the others");
    }
}
