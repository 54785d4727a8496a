//! `eval`: numbers about the pictures of a model, or about pictures that exist.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;
use serde::Serialize;

use crate::device;
use crate::measure::bootstrap::{interval, means_by_prompt};
use crate::measure::distances::{cmmd, frechet, frechet_infinity, kid};
use crate::measure::diversity::over_prompts;
use crate::measure::features::FeatureModel;
use crate::measure::pixels::PixelStatistics;
use crate::model::picture::open_rgb;
use crate::reward::{self, Prompt, Reward, RewardContext, RewardSpec};
use crate::sampling::kl::trajectory_kl;
use crate::sampling::trajectory::decode;
use crate::schedule::Step;
use crate::tools::draw::{Canvas, Drawing};

/// Pictures of a folder that are held at once where only their features are wanted.
const AT_ONCE: usize = 64;

/// What is known of a set of pictures. What cannot be had is `None`: null in JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Evaluation {
    /// How many pictures, of how many prompts.
    pub pictures: usize,
    pub prompts: usize,
    /// The mean of each reward over the prompts, and its 95% bootstrap interval.
    pub rewards: BTreeMap<String, f64>,
    pub rewards_low: BTreeMap<String, Option<f64>>,
    pub rewards_high: BTreeMap<String, Option<f64>>,
    #[serde(flatten)]
    pub distances: Distances,
    /// Mean of 1 - cosine over the pairs of a prompt's pictures, and the Vendi score, both means
    /// over the prompts.
    pub pairwise_cosine_distance: Option<f64>,
    pub vendi: Option<f64>,
    /// Of all pictures, see [`PixelStatistics`].
    pub pvs: Option<f64>,
    pub saturated: Option<f64>,
    pub saturation: Option<f64>,
    pub laplacian_variance: Option<f64>,
    pub jpeg_kb: Option<f64>,
    /// Mean KL of a trajectory with the trainer's noise to the model without adapter.
    pub kl: Option<f64>,
}

/// Distances to the reference, and what two halves of the reference are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distances {
    pub frechet: Option<f64>,
    pub frechet_infinity: Option<f64>,
    pub kid: Option<f64>,
    pub cmmd: Option<f64>,
    pub frechet_floor: Option<f64>,
    pub kid_floor: Option<f64>,
    pub cmmd_floor: Option<f64>,
}

/// Features that pictures are compared with.
pub struct Reference {
    /// What the distances are to.
    pub whole: Vec<Vec<f32>>,
    /// Two sets from one source: their distance is the floor.
    pub halves: [Vec<Vec<f32>>; 2],
}

impl Reference {
    /// Of a set of pictures: every second one is a half, so that pictures in the order of their
    /// prompts are shared out alike; no more than `pictures` in each, since a distance depends on
    /// how many there are.
    pub fn of_set(whole: Vec<Vec<f32>>, pictures: usize) -> Self {
        let half = |first: usize| -> Vec<Vec<f32>> {
            whole.iter().skip(first).step_by(2).take(pictures).cloned().collect()
        };
        Self { halves: [half(0), half(1)], whole }
    }
}

impl Distances {
    /// Between the features of pictures and of a reference of the same width.
    pub fn between(features: &[Vec<f32>], reference: &Reference, seed: u64) -> Self {
        let Reference { whole, halves: [a, b] } = reference;
        Self {
            frechet: frechet(features, whole),
            frechet_infinity: frechet_infinity(features, whole, seed),
            kid: kid(features, whole),
            cmmd: cmmd(features, whole),
            frechet_floor: frechet(a, b),
            kid_floor: kid(a, b),
            cmmd_floor: cmmd(a, b),
        }
    }
}

/// Pictures with the number of each one's prompt.
pub struct PictureSet {
    pub images: Vec<RgbImage>,
    pub prompt_of: Vec<usize>,
}

impl Evaluation {
    /// What needs nothing but the pictures.
    pub fn of(set: &PictureSet) -> Self {
        let prompts = set.prompt_of.iter().max().map_or(0, |last| last + 1);
        let base = Self { pictures: set.images.len(), prompts, ..Self::default() };
        let Some(found) = PixelStatistics::of(&set.images) else { return base };
        Self {
            // A single picture has nothing to vary from.
            pvs: (set.images.len() > 1).then_some(found.pvs),
            saturated: Some(found.saturated),
            saturation: Some(found.saturation),
            laplacian_variance: Some(found.laplacian_variance),
            jpeg_kb: Some(found.jpeg_kb),
            ..base
        }
    }

    /// Adds a reward by its scores of the pictures.
    pub fn add_reward(&mut self, name: &str, scores: &[f64], prompt_of: &[usize], seed: u64) {
        let Some(found) = interval(&means_by_prompt(scores, prompt_of), seed) else { return };
        self.rewards.insert(name.into(), found.mean);
        self.rewards_low.insert(name.into(), found.bounds.map(|b| b.low));
        self.rewards_high.insert(name.into(), found.bounds.map(|b| b.high));
    }

    /// Adds what the pictures' features say.
    pub fn add_features(
        &mut self,
        features: &[Vec<f32>],
        prompt_of: &[usize],
        reference: Option<&Reference>,
        seed: u64,
    ) {
        let found = over_prompts(features, prompt_of);
        self.pairwise_cosine_distance = found.pairwise_cosine_distance;
        self.vendi = found.vendi;
        if let Some(reference) = reference {
            self.distances = Distances::between(features, reference, seed);
        }
    }
}

/// Draws the pictures of a canvas, numbered from `first`.
///
/// # Errors
/// When the device fails.
pub fn pictures(
    canvas: &Canvas,
    drawing: &Drawing,
    tick: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Drawn> {
    let drawn = canvas.draw(drawing, tick, |replica, drawn| {
        let latents = device::tensor::read(&drawn.latents)?;
        Ok((decode(&replica.pipeline.vae, &drawn.latents)?, latents))
    })?;
    let (images, latents): (Vec<_>, Vec<_>) = drawn.into_iter().unzip();
    Ok(Drawn { images: images.concat(), latents: latents.concat() })
}

/// Pictures with the latents that they were decoded from.
pub struct Drawn {
    pub images: Vec<RgbImage>,
    pub latents: Vec<f32>,
}

/// The mean KL of the trajectories of a canvas's pictures by its adapter, with noise.
///
/// # Errors
/// When the device fails.
pub fn kl(
    canvas: &Canvas,
    steps: &[Step],
    at_once: usize,
    tick: &(dyn Fn() -> Result<()> + Sync),
) -> Result<f64> {
    let policies = canvas.policies();
    let drawing = Drawing { policies: &policies, steps, first: 0, at_once };
    let each = canvas.request(&drawing, |r| trajectory_kl(&canvas.fleet, r, tick))?;
    Ok(each.iter().sum::<f64>() / each.len() as f64)
}

/// The pictures of a folder in the order of their names: PNG and JPEG files.
///
/// # Errors
/// Names the flag and the folder that is missing or holds no picture.
pub fn picture_files(flag: &str, dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("{flag} {}: cannot be read; give a folder", dir.display()))?;
    let is_picture = |path: &PathBuf| {
        let end = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        path.is_file() && ["png", "jpg", "jpeg"].iter().any(|e| end.eq_ignore_ascii_case(e))
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("{flag} {}", dir.display()))?.path();
        found.extend(Some(path).filter(is_picture));
    }
    if found.is_empty() {
        bail!("{flag} {}: holds no picture; PNG and JPEG files are read", dir.display());
    }
    found.sort();
    Ok(found)
}

/// Features of all pictures of a folder, a few of which are held at once.
///
/// # Errors
/// Names the folder or the picture that cannot be read.
pub fn folder_features(model: &FeatureModel, flag: &str, dir: &Path) -> Result<Vec<Vec<f32>>> {
    let mut features = Vec::new();
    for files in picture_files(flag, dir)?.chunks(AT_ONCE) {
        let images: Vec<RgbImage> = files.iter().map(|f| open_rgb(f)).collect::<Result<_>>()?;
        features.extend(model.of(&images)?);
    }
    Ok(features)
}

/// What a user should know of the distances, where there are few pictures.
pub fn too_few(pictures: usize, width: usize) -> Option<String> {
    let enough = 10 * width;
    (pictures < enough).then(|| {
        format!(
            "frechet: {pictures} pictures are fewer than 10 for each of {width} features, and its \
             bias is large; compare it with frechet_floor, use kid or cmmd, or give {enough}"
        )
    })
}

/// The number of each picture's prompt, where there are as many pictures of each.
///
/// # Errors
/// When the prompts do not divide the pictures.
pub fn prompt_numbers(pictures: usize, prompts: usize) -> Result<Vec<usize>> {
    ensure!(
        prompts > 0 && pictures.is_multiple_of(prompts),
        "--prompts: {prompts} prompts for {pictures} pictures; give as many pictures of each, in \
         the order of the prompts"
    );
    Ok((0..pictures).map(|i| i / (pictures / prompts)).collect())
}

/// Scores of pictures by each reward, times its weight.
///
/// # Errors
/// When a reward cannot be opened or fails.
pub fn scores(
    specs: &[RewardSpec],
    context: &RewardContext,
    images: &[RgbImage],
    prompts: &[Prompt],
) -> Result<Vec<Vec<f64>>> {
    // All are opened before one is asked: a name that is wrong costs no time.
    let opened: Vec<Box<dyn Reward>> =
        specs.iter().map(|s| reward::open(&s.reward, context)).collect::<Result<_>>()?;
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let column = |(spec, mut reward): (&RewardSpec, Box<dyn Reward>)| {
        let scores = device::guard(|| reward::score(&mut *reward, &spec.shown, images, &prompts))?;
        Ok(scores.into_iter().map(|s| spec.weight * s).collect())
    };
    specs.iter().zip(opened).map(column).collect()
}
