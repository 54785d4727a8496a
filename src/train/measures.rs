//! An evaluation of a run: pictures of fixed prompts and noise, their rewards, and what they are
//! like besides.

use anyhow::Result;
use image::RgbImage;

use super::evaluation::{Extent, grid};
use super::metrics::Measures;
use super::rewards::Scores;
use super::run::{Evaluation, Run};
use crate::measure::bootstrap::means_by_prompt;
use crate::measure::distances::{cmmd, frechet, kid};
use crate::measure::diversity::over_prompts;
use crate::measure::pixels::PixelStatistics;

/// Draws an evaluation by the adapter as it is, scores and measures it.
pub(super) fn evaluate(run: &mut Run, extent: Extent) -> Result<Evaluation> {
    let plan = run.plan_evaluation(extent)?;
    let images = run.draw(&plan)?;
    let own = run.fleet.part_of(images.len());
    let numbers: Vec<usize> = own.clone().collect();
    let scores = run.score(&numbers, &images[own], &plan.prompts)?;
    let totals = scores.totals();
    let reward_mean = totals.iter().sum::<f64>() / totals.len() as f64;
    let measures = match extent {
        Extent::Full => Some(measures(run, &images, &scores)?),
        Extent::Row | Extent::Probe => None,
    };
    let grid = grid(run.settings, &images);
    Ok(Evaluation { grid, reward_mean, rewards: scores.means(), measures })
}

/// What pictures are compared by, where the run has a model for it: each process looks at its part.
fn features(run: &Run, images: &[RgbImage]) -> Result<Option<Vec<Vec<f32>>>> {
    let Some(model) = &run.features else { return Ok(None) };
    let own = run.fleet.part_of(images.len());
    let found = if own.is_empty() { Ok(Vec::new()) } else { model.of(&images[own]) };
    Ok(Some(run.fleet.world.all(found)?.concat()))
}

/// Measures the pictures of a whole evaluation, drawn by the adapter as it is. The first time their
/// features become the run's base.
fn measures(run: &mut Run, images: &[RgbImage], scores: &Scores) -> Result<Measures> {
    let prompts = run.settings.evaluation_prompts().len();
    let features = features(run, images)?;
    let prompt_of: Vec<usize> = (0..images.len()).map(|i| i % prompts).collect();
    let found = features.as_ref().map(|rows| over_prompts(rows, &prompt_of));
    if run.state.epoch == 0 && run.state.updates == 0 && run.base_features.is_none() {
        run.base_features.clone_from(&features);
    }
    type Distance = fn(&[Vec<f32>], &[Vec<f32>]) -> Option<f64>;
    let to_base = |of: Distance| of(features.as_ref()?, run.base_features.as_ref()?);
    let pixels = PixelStatistics::of(images);
    Ok(Measures {
        pictures: images.len(),
        reward_by_prompt: means_by_prompt(&scores.totals(), &prompt_of),
        rewards_by_prompt: scores.by_prompt(&prompt_of),
        pvs: pixels.map(|p| p.pvs).filter(|_| images.len() > 1),
        saturated: pixels.map(|p| p.saturated),
        saturation: pixels.map(|p| p.saturation),
        laplacian_variance: pixels.map(|p| p.laplacian_variance),
        jpeg_kb: pixels.map(|p| p.jpeg_kb),
        pairwise_cosine_distance: found.and_then(|f| f.pairwise_cosine_distance),
        vendi: found.and_then(|f| f.vendi),
        frechet: to_base(frechet),
        kid: to_base(kid),
        cmmd: to_base(cmmd),
        // A row of pictures is enough: a trajectory has many steps.
        kl: Some(run.kl(&run.plan_evaluation(Extent::Row)?)?).filter(|kl| kl.is_finite()),
    })
}
