//! `image-reward`: ImageReward (Xu et al. 2023), a BLIP that reads the prompt while it looks at the
//! picture.

use std::path::Path;

use anyhow::{Context, Result};
use image::RgbImage;

use super::aesthetic::Head;
use super::open::Opening;
use super::prompt::Prompt;
use super::score::Reward;
use crate::device::{Compute, in_order, rows_at_a_time};
use crate::model::blip::Blip;
use crate::model::clip::PICTURES_AT_ONCE;
use crate::model::clip::files::Files;

/// Mean and deviation of its scores, by which it is normalised.
const MEAN: f64 = 0.16717;
const DEVIATION: f64 = 1.03340;

/// What its checkpoint is called; BERT's may lie beside it.
pub const FILE: &str = "ImageReward.pt";

/// The network with its head.
pub struct ImageReward {
    blip: Blip,
    head: Head,
    compute: Compute,
    name: String,
}

impl ImageReward {
    /// Loads a folder with ImageReward.pt, med_config.json and BERT's vocabulary.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn open(opening: &Opening) -> Result<Self> {
        let path = Path::new(opening.needs("PATH")?);
        let load = || {
            let mut files = Files::open(path, &[FILE])?;
            let head = Head::of(&files.weights, "mlp.")?;
            let (device, storage) = (&opening.compute.burn, opening.storage());
            let blip = Blip::load(&mut files, device, storage)?;
            let (width, own) = (head.layers[0].inputs, blip.width);
            anyhow::ensure!(
                width == own,
                "{}: tensor mlp.layers.0.weight takes features {width} wide, the text encoder \
                 gives {own}",
                files.weights.source().display()
            );
            let name = opening.name();
            Ok(Self { blip, head, compute: opening.compute.clone(), name })
        };
        load().with_context(|| opening.name())
    }
}

impl Reward for ImageReward {
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let rows = rows_at_a_time(self.compute.threads(), images.len(), PICTURES_AT_ONCE);
        let batches: Vec<_> = images.chunks(rows).zip(prompts.chunks(rows)).collect();
        let features = in_order::map(&self.compute, &batches, |(images, prompts)| {
            let texts: Vec<&str> = prompts.iter().map(|p| p.text.as_str()).collect();
            self.blip.features(images, &texts)
        });
        let features = features.with_context(|| self.name.clone())?;
        let score = |feature: &Vec<f32>| (self.head.forward(feature) - MEAN) / DEVIATION;
        Ok(features.concat().iter().map(score).collect())
    }
}
