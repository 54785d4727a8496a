//! `clip-score`, `pick-score` and `hps-v2.1`: how well a picture fits its prompt, by a dual
//! encoder.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use image::RgbImage;

use super::open::Opening;
use super::prompt::Prompt;
use super::score::Reward;
use crate::device::Compute;
use crate::model::clip::{Clip, PICTURES_AT_ONCE, Towers, cosine};
use crate::model::picture::{Fit, Preparation};

/// What a dual encoder's cosine is turned into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// CLIPScore without its scaling and its cut at 0 (Hessel et al. 2021).
    Cosine,
    /// exp(logit_scale) times the cosine: PickScore (Kirstain et al. 2023).
    Logit,
    /// The cosine of pictures that are prepared whole, with black at the sides: HPS v2.1 (Wu et al.
    /// 2023).
    Hps,
}

/// A dual encoder, and the features of the prompts that it has seen.
pub struct DualEncoder {
    clip: Clip,
    factor: f64,
    compute: Compute,
    texts: HashMap<String, Vec<f32>>,
    name: String,
}

impl DualEncoder {
    /// Loads a folder or weight file.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn open(opening: &Opening, scale: Scale) -> Result<Self> {
        let path = Path::new(opening.needs("PATH")?);
        let (device, storage, name) = (&opening.compute.burn, opening.storage(), opening.name());
        let mut clip =
            Clip::load(path, Towers::Both, device, storage).with_context(|| name.clone())?;
        let factor = match scale {
            Scale::Cosine | Scale::Hps => 1.0,
            Scale::Logit => {
                let none = || anyhow!("{name}: its weights have no tensor logit_scale");
                clip.scale.ok_or_else(none)?
            }
        };
        if scale == Scale::Hps {
            let Preparation { mean, std, .. } = clip.preparation;
            let size = clip.vision.config.size;
            clip.preparation = Preparation { mean, std, ..Preparation::clip(Fit::Hps, size) };
        }
        let compute = opening.compute.clone();
        Ok(Self { clip, factor, compute, texts: HashMap::new(), name })
    }
}

impl Reward for DualEncoder {
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let mut new: Vec<&str> = prompts.iter().map(|p| p.text.as_str()).collect();
        new.sort_unstable();
        new.dedup();
        new.retain(|text| !self.texts.contains_key(*text));
        for texts in new.chunks(PICTURES_AT_ONCE) {
            let features = self.clip.text_features(texts);
            let features = features.with_context(|| self.name.clone())?;
            self.texts.extend(texts.iter().map(|t| t.to_string()).zip(features));
        }
        let features = self.clip.in_batches(&self.compute, images, Clip::image_features);
        let features = features.with_context(|| self.name.clone())?;
        let score = |(image, prompt): (&Vec<f32>, &&Prompt)| {
            self.factor * cosine(image, &self.texts[&prompt.text])
        };
        Ok(features.iter().zip(prompts).map(score).collect())
    }
}
