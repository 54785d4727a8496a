//! `aesthetic`: how pleasing a picture is, by LAION's heads on CLIP's image features.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use image::RgbImage;

use super::open::Opening;
use super::prompt::Prompt;
use super::score::Reward;
use crate::device::Compute;
use crate::io::weights::Weights;
use crate::model::clip::{Clip, Towers};

/// An image encoder with a head.
pub struct Aesthetic {
    clip: Clip,
    head: Head,
    compute: Compute,
    name: String,
}

impl Aesthetic {
    /// Loads `CLIP,HEAD`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged, of the wrong width or not
    /// supported.
    pub fn open(opening: &Opening) -> Result<Self> {
        let given = || opening.name();
        let both = opening.needs("CLIP,HEAD")?;
        let (clip, head) = both.rsplit_once(',').ok_or_else(|| {
            anyhow!("{}: give CLIP,HEAD, an image encoder and the file of its head", given())
        })?;
        let head = Head::load(Path::new(head)).with_context(given)?;
        let (device, storage) = (&opening.compute.burn, opening.storage());
        let clip =
            Clip::load(Path::new(clip), Towers::Vision, device, storage).with_context(given)?;
        let width = clip.vision.config.projection;
        ensure!(
            head.layers[0].inputs == width,
            "{}: the head takes features {} wide, the encoder gives {width}; use the head that was \
             made for this encoder",
            given(),
            head.layers[0].inputs
        );
        Ok(Self { clip, head, compute: opening.compute.clone(), name: given() })
    }
}

impl Reward for Aesthetic {
    fn score(&mut self, images: &[RgbImage], _prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let features = self.clip.in_batches(&self.compute, images, Clip::image_features);
        let features = features.with_context(|| self.name.clone())?;
        Ok(features.iter().map(|f| self.head.forward(f)).collect())
    }
}

/// Linear layers one behind the other, without activations: on the host, since they are few.
pub struct Head {
    pub layers: Vec<Layer>,
}

/// A linear layer, `[outputs, inputs]`.
pub struct Layer {
    pub inputs: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Head {
    /// Loads a linear head (`weight`, `bias`) or an MLP (`layers.N.weight`, `layers.N.bias`).
    ///
    /// # Errors
    /// Names the file and the tensor that is missing or does not fit.
    pub fn load(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "{}: there is no such file", path.display());
        Self::of(&Weights::open_any(path)?, "")
    }

    /// The head among other tensors, below a prefix.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn of(weights: &Weights, prefix: &str) -> Result<Self> {
        let path = weights.source().display();
        let mut places: Vec<(usize, String)> = weights
            .names()
            .filter_map(|name| {
                let place = name.strip_prefix(prefix)?.strip_suffix(".weight")?;
                let number = place.strip_prefix("layers.")?.parse().ok()?;
                Some((number, format!("{prefix}{place}.")))
            })
            .collect();
        places.sort_unstable();
        if places.is_empty() {
            places.push((0, prefix.to_string()));
        } else {
            let both = weights.has(&format!("{prefix}weight"));
            ensure!(!both, "{path}: holds both a linear head and an MLP");
        }
        let mut layers: Vec<Layer> = Vec::new();
        for (_, place) in &places {
            let weight = weights.f32(&format!("{place}weight"))?;
            let bias = weights.f32(&format!("{place}bias"))?;
            let fits = weight.shape.len() == 2 && weight.shape[..1] == bias.shape[..];
            let inputs = weight.shape.get(1).copied().unwrap_or_default();
            let before = layers.last().map_or(inputs, |l| l.bias.len());
            ensure!(
                fits && inputs == before && before > 0,
                "{path}: tensor {place}weight has shape {:?} and the bias {:?}, which do not \
                 follow the layer before",
                weight.shape,
                bias.shape
            );
            layers.push(Layer { inputs: before, weight: weight.values, bias: bias.values });
        }
        let outputs = layers.last().map_or(0, |l| l.bias.len());
        ensure!(outputs == 1, "{path}: the head gives {outputs} numbers a picture, not one");
        Ok(Self { layers })
    }

    /// The number of a feature.
    pub fn forward(&self, feature: &[f32]) -> f64 {
        let mut x: Vec<f64> = feature.iter().map(|&v| f64::from(v)).collect();
        for layer in &self.layers {
            let row = |(row, &bias): (&[f32], &f32)| {
                let sum: f64 = row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * x).sum();
                sum + f64::from(bias)
            };
            x = layer.weight.chunks(layer.inputs).zip(&layer.bias).map(row).collect();
        }
        x[0]
    }
}
