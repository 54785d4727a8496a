//! What pictures are compared by: the features of an image encoder.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use image::RgbImage;

use crate::device::Compute;
use crate::model::Storage;
use crate::model::clip::files::Files;
use crate::model::clip::{Clip, Towers};

/// The folder or weight file of a CLIP that `--features clip:PATH` names.
///
/// # Errors
/// Names the value and what is supported.
pub fn clip_path(given: &str) -> Result<&Path> {
    let unknown = || anyhow!("--features {given}: unknown; give clip:PATH, the folder or file");
    let (name, path) = given.split_once(':').ok_or_else(unknown)?;
    ensure!(name == "clip", unknown());
    ensure!(
        !path.trim().is_empty(),
        "--features {given}: names nothing; write clip:PATH, the folder or file of a CLIP"
    );
    Ok(Path::new(path))
}

/// An image encoder.
pub struct FeatureModel {
    clip: Clip,
    compute: Compute,
}

impl FeatureModel {
    /// Loads what `--features` names; as for rewards, weights are f32 or f16.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn open(given: &str, compute: &Compute, storage: Storage) -> Result<Self> {
        let clip =
            Clip::load(clip_path(given)?, Towers::Vision, &compute.burn, storage.unquantised())
                .with_context(|| format!("--features {given}"))?;
        Ok(Self { clip, compute: compute.clone() })
    }

    /// Projected features as they come, not normalised, a row of the same width for each picture.
    ///
    /// # Errors
    /// When the device fails, or a feature is not finite.
    pub fn of(&self, images: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        let rows = self.clip.in_batches(&self.compute, images, Clip::projected)?;
        ensure!(
            rows.iter().flatten().all(|v| v.is_finite()),
            "--features: a feature is not finite; are the weights damaged?"
        );
        Ok(rows)
    }
}

/// Values of the weights that [`FeatureModel::open`] loads.
///
/// # Errors
/// When the files cannot be opened.
pub fn model_size(given: &str) -> Result<usize> {
    let files =
        Files::open(clip_path(given)?, &[]).with_context(|| format!("--features {given}"))?;
    Ok(files.vision_size())
}
