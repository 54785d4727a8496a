//! The pictures and the reward that show where a run stands: fixed prompts and noise, before, after and at each epoch.

use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{Tensor, TensorData};
use image::RgbImage;
use serde_json::json;

use crate::artifacts::{before_after, grid};
use crate::model::Conditioning;
use crate::philox::{self, Stream};
use crate::progress::check_stop;
use crate::rollout::{batches, decode, for_batches, sample};
use crate::train::{Run, Summary};

/// Prompts that the grids show at most.
pub(crate) const GRID_COLUMNS: usize = 4;

impl Run<'_> {
    pub(crate) fn grid_columns(&self) -> usize {
        self.s.groups().min(GRID_COLUMNS)
    }

    /// Pictures of fixed prompts and noise, and their mean reward. `full` takes four rows instead of one: the reward
    /// before and after is worth the time, the epochs between have their rollout's. A flow is drawn without noise, as
    /// its users will draw it.
    pub(crate) fn evaluate(&mut self, full: bool) -> Result<(Vec<RgbImage>, f64)> {
        let s = self.s;
        let columns = self.grid_columns();
        let total = if full { 4 * columns } else { columns };
        let prompts: Vec<String> = (0..total).map(|i| s.prompt[i % columns].clone()).collect();
        let [c, h, w] = self.pipeline.latent_shape();
        let lora = self.adapter.to_device(&self.compute.burn, false);
        let quiet = self.pipeline.family.is_flow();
        let steps: Vec<_> = self.steps.iter().map(|s| if quiet { s.without_noise() } else { *s }).collect();
        let starts = batches(&self.compute, total, columns.min(s.batch));
        let rows = for_batches(&self.compute, &starts, |&(first, n)| {
            let cond = Conditioning::cat((first..first + n).map(|i| self.fixed.rows(i % columns, 1)).collect());
            let uncond = self.uncond.repeat(n);
            let noise: Vec<f32> = (first..first + n)
                .flat_map(|i| philox::noise(s.seed, Stream::Evaluation, i as u32, 0, c * h * w))
                .collect();
            let latents = Tensor::from_data(TensorData::new(noise, [n, c, h, w]), &self.compute.burn);
            let policy = self.policy(Some(&lora), &cond, &uncond);
            // Images numbered from the top, which no rollout reaches.
            let first_image = u32::MAX - (4 * columns - first) as u32;
            let sampled = sample(&policy, latents, &steps, &[], (s.seed, first_image), check_stop)?;
            decode(&self.pipeline.vae, &sampled.latents)
        })?;
        let images = rows.concat();
        let scores = self.score(&images, &prompts)?;
        Ok((images, scores.iter().sum::<f64>() / total as f64))
    }

    /// Adds an evaluation to the run's folder: its grid, which is returned, and its line of metrics.
    pub(crate) fn show(&mut self, epoch: usize, images: &[RgbImage], score: f64) -> Result<RgbImage> {
        let grid = grid(images, self.grid_columns());
        self.folder.picture(format!("grids/epoch-{epoch:05}.png"), &grid)?;
        self.folder.metric(json!({ "kind": "evaluation", "epoch": epoch, "reward_mean": score }));
        Ok(grid)
    }

    pub(crate) fn finish(&mut self) -> Result<Summary> {
        let dir = self.folder.dir.clone();
        let path = |epoch: usize| dir.join(format!("grids/epoch-{epoch:05}.png"));
        let open = |epoch: usize| image::open(path(epoch)).map(|i| i.to_rgb8()).context("a grid of the run");
        let (before, mut after): (RgbImage, RgbImage) = (open(0)?, open(self.s.epochs)?);
        if before.dimensions() != after.dimensions() {
            // The run was meant to be longer when its last epoch was drawn, in one row.
            let (images, score) = self.evaluate(true)?;
            after = self.show(self.s.epochs, &images, score)?;
        }
        self.folder.picture("before_after.png", &before_after(&before, &after))?;
        self.folder.flush(|_| Ok(()))?;
        let score = |epoch: usize| evaluation(&dir, epoch);
        Ok(Summary { before: score(0)?, after: score(self.s.epochs)?, out: dir.clone() })
    }
}

/// The evaluation's mean reward after an epoch, from the run's metrics.
fn evaluation(dir: &Path, epoch: usize) -> Result<f64> {
    let text = crate::files::read_text(&dir.join("metrics.jsonl"))?;
    let mut lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let line = lines.rfind(|l| l["kind"] == "evaluation" && l["epoch"] == epoch);
    line.and_then(|l| l["reward_mean"].as_f64()).with_context(|| format!("no evaluation of epoch {epoch}"))
}
