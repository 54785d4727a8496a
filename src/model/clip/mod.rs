//! A dual encoder, CLIP: pictures and texts as features of one space. The models of transformers'
//! `CLIPModel` and of open_clip.

pub mod config;
pub mod files;
pub mod open_clip;
pub mod vision;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor};
use image::RgbImage;

use self::config::DualConfig;
use self::files::Files;
use self::open_clip::Layout;
use self::vision::Vision;
use super::loader::{Loader, Storage};
use super::picture::Preparation;
use super::text::clip::ClipText;
use super::text::tokenizer::{CLIP_VOCABULARY, Tokenizer};
use crate::device::tensor::read;
use crate::device::{Compute, in_order, rows_at_a_time};

/// Pictures, or texts, that an encoder takes at once.
pub const PICTURES_AT_ONCE: usize = 8;

/// A loaded dual encoder.
pub struct Clip {
    pub vision: Vision,
    pub preparation: Preparation,
    text: Option<Text>,
    /// exp(logit_scale), where the weights have it.
    pub scale: Option<f64>,
    device: Device,
}

struct Text {
    model: ClipText,
    tokenizer: Tokenizer,
}

/// A row of features for each picture or text.
pub type Features = Vec<Vec<f32>>;

/// Which encoders are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Towers {
    Both,
    Vision,
}

impl Clip {
    /// Loads a folder in transformers' or open_clip's layout, or a weight file.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(path: &Path, towers: Towers, device: &Device, storage: Storage) -> Result<Self> {
        let Files { mut weights, folder } = Files::open(path, &[])?;
        let layout = Layout::of(&weights);
        let mend = layout != Layout::Transformers;
        if mend {
            open_clip::as_transformers(&mut weights)?;
        }
        let DualConfig { vision, text, preparation, pad } =
            DualConfig::read(&folder, &weights, layout)?;
        let loader = Loader::new(&weights, device, storage);
        let vision = Vision::load(&loader, vision)?;
        let text = match (towers, text) {
            (Towers::Vision, _) => None,
            (Towers::Both, Some(c)) => {
                let has = |name: &str| folder.join(name).is_file();
                let own = has("tokenizer.json") || (has("vocab.json") && has("merges.txt"));
                let tokenizer = if own {
                    Tokenizer::load(&folder, c.max_tokens)?
                } else {
                    ensure!(
                        c.vocabulary == CLIP_VOCABULARY,
                        "{}: holds no tokenizer.json, and no vocab.json with merges.txt; the text \
                         encoder's vocabulary of {} is not CLIP's own",
                        folder.display(),
                        c.vocabulary
                    );
                    Tokenizer::clip(c.max_tokens, pad, mend)?
                };
                ensure!(
                    weights.has("text_projection.weight"),
                    "{}: tensor text_projection.weight is missing",
                    weights.source().display()
                );
                Some(Text { model: ClipText::of(&loader, &c)?, tokenizer })
            }
            (Towers::Both, None) => {
                anyhow::bail!("{}: has no text encoder", weights.source().display())
            }
        };
        let scale = match weights.has("logit_scale") {
            true => {
                let values = weights.f32("logit_scale")?.values;
                ensure!(
                    values.len() == 1,
                    "{}: tensor logit_scale holds {} numbers, not one",
                    weights.source().display(),
                    values.len()
                );
                Some(f64::from(values[0]).exp())
            }
            false => None,
        };
        Ok(Self { vision, preparation, text, scale, device: device.clone() })
    }

    /// Features of pictures, L2-normalised, a row each.
    ///
    /// # Errors
    /// When the device fails, or a feature is not finite.
    pub fn image_features(&self, images: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        self.projected(images)?.iter().map(|row| normalised(row)).collect()
    }

    /// Projected features of pictures as they come, a row each.
    ///
    /// # Errors
    /// When the device fails.
    pub fn projected(&self, images: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        rows(&self.vision.forward(self.preparation.batch(images, &self.device)?))
    }

    /// Any of these functions over many pictures, in batches over the device's cores.
    ///
    /// # Errors
    /// As `of`.
    pub fn in_batches(
        &self,
        compute: &Compute,
        images: &[RgbImage],
        of: fn(&Self, &[RgbImage]) -> Result<Features>,
    ) -> Result<Features> {
        let rows = rows_at_a_time(compute.threads(), images.len(), PICTURES_AT_ONCE);
        let batches: Vec<&[RgbImage]> = images.chunks(rows).collect();
        Ok(in_order::map(compute, &batches, |batch| of(self, batch))?.concat())
    }

    /// Features of texts, L2-normalised, a row each.
    ///
    /// # Errors
    /// When a text cannot be tokenized, the device fails, or a feature is not finite.
    pub fn text_features(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let text = self.text.as_ref().context("the text encoder was not loaded")?;
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<Vec<u32>> =
            texts.iter().map(|t| text.tokenizer.encode(t)).collect::<Result<_>>()?;
        rows(&text.model.forward(&ids)?.pooled)?.iter().map(|row| normalised(row)).collect()
    }
}

/// Features on the host, a row each.
fn rows(features: &Tensor<2>) -> Result<Vec<Vec<f32>>> {
    let width = features.dims()[1];
    Ok(read(features)?.chunks(width).map(<[f32]>::to_vec).collect())
}

/// A feature of norm 1.
fn normalised(row: &[f32]) -> Result<Vec<f32>> {
    let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    ensure!(
        norm.is_finite() && norm > 0.0,
        "a feature is not finite or zero; are the weights or the picture preparation damaged?"
    );
    Ok(row.iter().map(|&v| (f64::from(v) / norm) as f32).collect())
}

/// The cosine of two features of norm 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
