//! BLIP's two towers as ImageReward joins them: a ViT of timm's, and a BERT whose layers attend to
//! the picture.

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::{Device, Tensor};
use image::RgbImage;
use serde_json::json;

use super::attention::Attention;
use super::clip::files::Files;
use super::clip::vision::tokens;
use super::conditioning::Conditioning;
use super::config::Config;
use super::loader::{Loader, Storage};
use super::nn::{Activation, Conv2d, LayerNorm, Linear};
use super::picture::{Fit, Preparation};
use super::text::clip::{Layer, LayerNames};
use super::text::tokenizer::Tokenizer;
use crate::device::tensor::{read, upload};
use crate::io::weights::Weights;
use crate::kernels::rows::rows_of;

/// Tokens of a prompt, as ImageReward was trained.
const TOKENS: usize = 35;
/// Width of a head of the ViT.
const HEAD: usize = 64;
/// timm's.
const VISION_EPS: f64 = 1e-6;

/// Where the ViT lies in the checkpoint, and the BERT.
const VISION: &str = "blip.visual_encoder";
const TEXT: &str = "blip.text_encoder";

/// The numbers of the BERT, from med_config.json.
struct TextConfig {
    width: usize,
    heads: usize,
    inner: usize,
    layers: usize,
    vocabulary: usize,
    positions: usize,
    eps: f64,
    activation: Activation,
}

impl TextConfig {
    fn of(c: &Config) -> Result<Self> {
        let width = c.width("hidden_size", 768)?;
        c.only(&[("add_cross_attention", json!(true)), ("model_type", json!("bert"))])?;
        Ok(Self {
            width,
            heads: c.heads("num_attention_heads", 12, width)?,
            inner: c.width("intermediate_size", 3072)?,
            layers: c.count("num_hidden_layers", 12)?,
            vocabulary: c.width("vocab_size", 30524)?,
            positions: c.width("max_position_embeddings", 512)?,
            eps: c.positive("layer_norm_eps", 1e-12)?,
            activation: c.activation("hidden_act", "gelu")?,
        })
    }
}

/// A layer of timm's ViT.
const VISION_LAYER: LayerNames = LayerNames {
    norm1: "norm1",
    attention: "attn",
    projections: ["q", "k", "v", "proj"],
    norm2: "norm2",
};

struct VisionTower {
    size: usize,
    class: Tensor<3>,
    patches: Conv2d,
    positions: Tensor<3>,
    layers: Vec<Layer>,
    norm: LayerNorm,
}

impl VisionTower {
    /// The sizes are the tensors' own.
    fn load(root: &Loader) -> Result<Self> {
        let weights = root.weights;
        let shape = |part: &str| {
            let name = root.name(part);
            weights.shape(&name).map(<[usize]>::to_vec).with_context(|| {
                let path = weights.source().display();
                format!("{path}: tensor {name} is missing: these are not ImageReward's weights")
            })
        };
        let (kernel, positions) = (shape("patch_embed.proj.weight")?, shape("pos_embed")?);
        let fits = kernel.len() == 4 && positions.len() == 3 && kernel[0] == positions[2];
        ensure!(
            fits && kernel[0].is_multiple_of(HEAD) && positions[1] > 1 && kernel[2] > 0,
            "{}: tensors patch_embed.proj.weight {kernel:?} and pos_embed {positions:?} are not a \
             ViT's with heads of {HEAD}",
            weights.source().display()
        );
        let (width, patch, tokens) = (kernel[0], kernel[2], positions[1]);
        let inner = shape("blocks.0.mlp.fc1.weight")?.first().copied().unwrap_or_default();
        let count = (0..).take_while(|i| root.has(&format!("blocks.{i}.norm1.weight"))).count();
        let layers = (0..count).map(|i| {
            let layer = root.at(format!("blocks.{i}"));
            Layer::load(&layer, &VISION_LAYER, [width, inner], width / HEAD, VISION_EPS)
        });
        Ok(Self {
            size: patch * (tokens - 1).isqrt(),
            class: root.tensor("cls_token", [1, 1, width])?,
            patches: Conv2d::patches(root, "patch_embed.proj", 3, width, patch)?,
            positions: root.tensor("pos_embed", [1, tokens, width])?,
            layers: layers.collect::<Result<_>>()?,
            norm: LayerNorm::load(root, "norm", width, VISION_EPS)?,
        })
    }

    /// `[B, 3, size, size] -> [B, 1 + patches, width]`.
    fn forward(&self, pictures: Tensor<4>) -> Tensor<3> {
        let x = tokens(&self.patches, &self.class, pictures) + self.positions.clone();
        let run = |x, layer: &Layer| layer.forward(x, None, Activation::Gelu);
        self.norm.forward(self.layers.iter().fold(x, run))
    }
}

/// An attention of the BERT with its norm behind.
struct Attends {
    attention: Attention,
    norm: LayerNorm,
}

impl Attends {
    fn load(l: &Loader, c: &TextConfig, context: usize) -> Result<Self> {
        let names = ["self.query", "self.key", "self.value", "output.dense"];
        Ok(Self {
            attention: Attention::load(l, names, c.width, context, c.heads)?,
            norm: LayerNorm::load(l, "output.LayerNorm", c.width, c.eps)?,
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        context: Option<&Conditioning>,
        bias: Option<Tensor<4>>,
    ) -> Tensor<3> {
        self.norm.forward(x.clone() + self.attention.forward(x, context, bias, None))
    }
}

/// A layer of the BERT: text to text, text to picture, feed-forward.
struct TextLayer {
    own: Attends,
    cross: Attends,
    fc1: Linear,
    fc2: Linear,
    norm: LayerNorm,
}

struct TextTower {
    config: TextConfig,
    words: Tensor<2>,
    positions: Tensor<2>,
    norm: LayerNorm,
    layers: Vec<TextLayer>,
}

impl TextTower {
    fn load(root: &Loader, c: TextConfig, vision: usize) -> Result<Self> {
        let parts = root.at("embeddings");
        let layer = |i: usize| {
            let l = root.at(format!("encoder.layer.{i}"));
            anyhow::Ok(TextLayer {
                own: Attends::load(&l.at("attention"), &c, c.width)?,
                cross: Attends::load(&l.at("crossattention"), &c, vision)?,
                fc1: Linear::load(&l, "intermediate.dense", c.width, c.inner)?,
                fc2: Linear::load(&l, "output.dense", c.inner, c.width)?,
                norm: LayerNorm::load(&l, "output.LayerNorm", c.width, c.eps)?,
            })
        };
        Ok(Self {
            words: parts.tensor("word_embeddings.weight", [c.vocabulary, c.width])?,
            positions: parts.tensor("position_embeddings.weight", [c.positions, c.width])?,
            norm: LayerNorm::load(&parts, "LayerNorm", c.width, c.eps)?,
            layers: (0..c.layers).map(layer).collect::<Result<_>>()?,
            config: c,
        })
    }

    /// Token numbers, one row a text, with the pictures that they are read beside `[B, S, vision]`
    /// -> the last state of each first token, `[B, width]`. Padding is not attended to.
    fn forward(&self, ids: &[Vec<u32>], pad: u32, pictures: Tensor<3>) -> Tensor<2> {
        let (b, t, width) = (ids.len(), ids[0].len(), self.config.width);
        let device = pictures.device();
        let flat: Vec<usize> = ids.iter().flatten().map(|&i| i as usize).collect();
        let words = rows_of(&self.words, &flat).reshape([b, t, width]);
        let positions = self.positions.clone().narrow(0, 0, t).unsqueeze::<3>();
        let mask: Vec<f32> =
            ids.iter().flatten().map(|&i| if i == pad { -1e30 } else { 0.0 }).collect();
        let mask = upload(&mask, [b, 1, 1, t], &device);
        let mut x = self.norm.forward(words + positions);
        let seen = Conditioning::of_each(pictures, None);
        for layer in &self.layers {
            x = layer.own.forward(x, None, Some(mask.clone()));
            x = layer.cross.forward(x, Some(&seen), None);
            let y = self.config.activation.forward(layer.fc1.forward(x.clone(), None));
            x = layer.norm.forward(x + layer.fc2.forward(y, None));
        }
        x.narrow(1, 0, 1).squeeze_dim::<2>(1)
    }
}

/// Both towers with what they take.
pub struct Blip {
    /// Width of its features.
    pub width: usize,
    vision: VisionTower,
    text: TextTower,
    tokenizer: Tokenizer,
    preparation: Preparation,
    device: Device,
}

impl Blip {
    /// Loads ImageReward's checkpoint, with med_config.json and BERT's vocabulary beside it.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(files: &mut Files, device: &Device, storage: Storage) -> Result<Self> {
        let path = files.folder.join("med_config.json");
        ensure!(
            path.is_file(),
            "{}: missing; it lies beside ImageReward.pt where that was downloaded",
            path.display()
        );
        let config = TextConfig::of(&Config::read(&path)?)?;
        ensure!(
            config.positions >= TOKENS,
            "{}: max_position_embeddings = {} holds less than the {TOKENS} tokens of a prompt",
            path.display(),
            config.positions
        );
        let tokenizer = Tokenizer::load_bert(&files.folder, TOKENS)?;
        ensure!(
            tokenizer.entries() <= config.vocabulary,
            "{}: its vocabulary has {} entries, the text encoder {}; take bert-base-uncased's",
            files.folder.display(),
            tokenizer.entries(),
            config.vocabulary
        );
        split_attention(&mut files.weights)?;
        let root = Loader::new(&files.weights, device, storage);
        let vision = VisionTower::load(&root.at(VISION))?;
        let seen = vision.positions.dims()[2];
        let text = TextTower::load(&root.at(TEXT), config, seen)?;
        let preparation = Preparation::clip(Fit::OpenClip, vision.size);
        let width = text.config.width;
        Ok(Self { width, vision, text, tokenizer, preparation, device: device.clone() })
    }

    /// The features of pictures read beside their texts, a row each.
    ///
    /// # Errors
    /// When a text cannot be tokenized or the device fails.
    pub fn features(&self, images: &[RgbImage], texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let ids: Vec<Vec<u32>> =
            texts.iter().map(|t| self.tokenizer.encode(t)).collect::<Result<_>>()?;
        ensure!(
            ids.iter().flatten().all(|&i| (i as usize) < self.text.config.vocabulary),
            "a token is outside the text encoder's vocabulary of {}; do tokenizer and weights \
             belong together?",
            self.text.config.vocabulary
        );
        let seen = self.vision.forward(self.preparation.batch(images, &self.device)?);
        let features = self.text.forward(&ids, self.tokenizer.pad(), seen);
        Ok(read(&features)?.chunks(self.width).map(<[f32]>::to_vec).collect())
    }
}

/// Puts q, k and v of the ViT's layers apart.
fn split_attention(weights: &mut Weights) -> Result<()> {
    let fused = |n: &&str| n.starts_with(VISION) && n.contains(".attn.qkv.");
    let names: Vec<String> = weights.names().filter(fused).map(str::to_string).collect();
    for name in names {
        let (layer, kind) = name.split_once(".qkv.").ok_or_else(|| anyhow!("tensor {name}"))?;
        let parts = ["q", "k", "v"].map(|part| format!("{layer}.{part}.{kind}"));
        weights.split(&name, &parts)?;
    }
    Ok(())
}
