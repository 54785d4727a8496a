//! An epoch at work: its rollout and the updates done so far. It can be put away between two updates, so that a stopped
//! run loses no update, and taken up again to the bit.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, ensure};

use crate::checkpoint::{Seconds, State, Unfinished};
use crate::files::Named;
use crate::model::Conditioning;
use crate::philox::{self, Stream};
use crate::rollout::{Visit, batches};
use crate::schedule::Step;
use crate::train::Run;
use crate::update::Batch;

/// An epoch between its rollout and its checkpoint.
pub(crate) struct Work {
    pub batches: Vec<Batch>,
    pub draw: Draw,
    pub rewards: Vec<f64>,
    pub advantages: Vec<f32>,
    /// The metrics of the updates that are done.
    pub lines: Vec<String>,
    pub seconds: Seconds,
    /// Largest memory of sampling, decoding and updating, in bytes, where the system keeps it.
    pub peaks: [Option<u64>; 3],
}

/// What an epoch samples: functions of the seed and of its number. Image i belongs to prompt i mod P, so that every update
/// sees every prompt.
pub(crate) struct Draw {
    /// One for each image.
    pub prompts: Vec<String>,
    /// One row for each group.
    embeddings: Conditioning,
    /// The trained steps and their places in the schedule.
    pub trained: Vec<(usize, Step)>,
    /// First image and number of images of each batch.
    pub starts: Vec<(usize, usize)>,
    /// Number of the first image over the whole run.
    pub base: u32,
}

impl Draw {
    /// Conditional and unconditional embeddings of a batch.
    pub fn conditioning(&self, run: &Run, (first, n): (usize, usize)) -> (Conditioning, Conditioning) {
        let rows = (first..first + n).map(|i| self.embeddings.rows(i % run.s.groups(), 1)).collect();
        (Conditioning::cat(rows), run.uncond.repeat(n))
    }
}

impl Run<'_> {
    pub(crate) fn draw(&self, epoch: usize) -> Result<Draw> {
        let s = self.s;
        let (groups, total, per_update) = (s.groups(), s.images_per_epoch, s.images_per_update());
        let chosen = philox::choose(s.seed, Stream::Prompts, epoch as u32, s.prompt.len(), groups);
        let chosen: Vec<&str> = chosen.into_iter().map(|i| s.prompt[i].as_str()).collect();
        let update = batches(&self.compute, per_update, s.batch);
        let starts = (0..total).step_by(per_update).flat_map(|start| update.iter().map(move |&(i, n)| (start + i, n)));
        Ok(Draw {
            prompts: (0..total).map(|i| chosen[i % groups].to_string()).collect(),
            embeddings: self.pipeline.encode(&chosen)?,
            trained: self.trained_steps(epoch),
            starts: starts.collect(),
            base: (epoch * total) as u32,
        })
    }

    /// Writes the run as it stands between two updates: settings, metrics and pictures so far, the adapter, and a
    /// checkpoint that goes on with the next update.
    pub(crate) fn put_away(&mut self, work: &Work) -> Result<()> {
        let images = work.rewards.len();
        let column = |name: &str, part: fn(&Visit) -> &Vec<f32>| -> Vec<Named> {
            let of_step = |step: usize| {
                let values: Vec<f32> = work.batches.iter().flat_map(|b| part(&b.visits[step])).copied().collect();
                (format!("{name}.{step:05}"), vec![images, values.len() / images], values)
            };
            (0..work.draw.trained.len()).map(of_step).collect()
        };
        let mut tensors = column("x", |v| &v.x);
        tensors.extend(column("old", |v| &v.old));
        tensors.push(("advantages".into(), vec![work.advantages.len()], work.advantages.clone()));
        let unfinished =
            Unfinished { rewards: work.rewards.clone(), lines: work.lines.clone(), seconds: work.seconds, tensors };
        self.save(State { unfinished: Some(unfinished), ..self.state.clone() })?;
        self.kept = Some(format!("{} updates of epoch {}", work.lines.len(), self.state.epoch + 1));
        Ok(())
    }

    /// Takes up an epoch that was put away.
    ///
    /// # Errors
    /// When the checkpoint does not fit the settings.
    pub(crate) fn take_up(&self, found: Unfinished) -> Result<Work> {
        let draw = self.draw(self.state.epoch)?;
        let ([c, h, w], images) = (self.pipeline.latent_shape(), self.s.images_per_epoch);
        let mut tensors: BTreeMap<_, _> = found.tensors.into_iter().map(|(name, _, values)| (name, values)).collect();
        let mut tensor = |name: String, count: usize| {
            let fitting = tensors.remove(&name).filter(|values| values.len() == count);
            fitting.ok_or_else(|| anyhow!("visits.safetensors of the stopped epoch: {name} is not {count} values"))
        };
        let mut column = |name: &str| -> Result<Vec<Vec<f32>>> {
            (0..draw.trained.len()).map(|step| tensor(format!("{name}.{step:05}"), images * c * h * w)).collect()
        };
        let (x, old) = (column("x")?, column("old")?);
        let batches = draw.starts.iter().map(|&(first, n)| {
            let rows = |step: &Vec<f32>| step[first * c * h * w..(first + n) * c * h * w].to_vec();
            let visits = x.iter().zip(&old).map(|(x, old)| Visit { x: rows(x), old: rows(old) }).collect();
            Batch { first, first_image: draw.base + first as u32, shape: [n, c, h, w], visits }
        });
        ensure!(found.rewards.len() == images, "state.json of the stopped epoch: rewards must be {images} numbers");
        Ok(Work {
            batches: batches.collect(),
            advantages: tensor("advantages".into(), images)?,
            rewards: found.rewards,
            lines: found.lines,
            seconds: found.seconds,
            peaks: [None; 3],
            draw,
        })
    }
}
