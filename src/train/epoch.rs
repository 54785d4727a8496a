//! How far an epoch is. It can be suspended between two updates, so that a stopped run loses no
//! update, and restored to the bit.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::checkpoint::Unfinished;
use super::memory::PeakMemory;
use super::metrics::{EpochRecord, ScoreRecord, Seconds, UpdateRecord};
use super::plan::{EpochPlan, Part};
use super::update::TrajectoryBatch;
use crate::config::{Rollout, Settings};
use crate::io::tensors::TensorParts;
use crate::io::weights::Weights;
use crate::sampling::trajectory::Transition;

/// An epoch between its rollout and its checkpoint.
pub(crate) struct EpochState {
    pub plan: EpochPlan,
    pub batches: Vec<TrajectoryBatch>,
    /// The weighted sum of each image's rewards.
    pub rewards: Vec<f64>,
    /// What each reward gave.
    pub scores: BTreeMap<String, ScoreRecord>,
    pub advantages: Vec<f32>,
    /// Rows that the network computed in the rollout; guidance's are not counted twice.
    pub rollout_calls: usize,
    /// The updates that are done.
    pub updates: Vec<UpdateRecord>,
    pub seconds: Seconds,
    pub peaks: PeakMemory,
    /// Whether the adapter has been updated since the rollout by another process: then rho is not 1
    /// any more, and the self-test has to sample for itself.
    pub restored: bool,
}

/// Names of the tensors of a suspended epoch: latents and predictions of each trained step.
fn tensor_name(part: &str, step: usize) -> String {
    format!("{part}.{step:05}")
}

impl EpochState {
    /// What a checkpoint keeps of an epoch that is suspended, from where it lies: in this process,
    /// and in `others` what further processes have sampled, by the batch's number.
    pub fn tensors<'a>(
        &'a self,
        others: &'a BTreeMap<usize, TrajectoryBatch>,
    ) -> Vec<TensorParts<'a>> {
        let whole = |(i, own): (usize, &'a TrajectoryBatch)| others.get(&i).unwrap_or(own);
        let batches: Vec<&TrajectoryBatch> = self.batches.iter().enumerate().map(whole).collect();
        let (images, trajectories) = (self.rewards.len(), self.plan.starts.len());
        let column = |part: &str, of: fn(&Transition) -> &Vec<f32>, step: usize| {
            let own = batches.iter().filter_map(|b| b.at(step));
            let parts: Vec<&[f32]> = own.map(|transition| &of(transition)[..]).collect();
            let values: usize = parts.iter().map(|p| p.len()).sum();
            TensorParts {
                name: tensor_name(part, step),
                shape: vec![trajectories, values / trajectories],
                parts,
            }
        };
        let forward = !self.plan.times.is_empty();
        let steps = 0..if forward { 0 } else { self.plan.trained.len() };
        let mut tensors: Vec<TensorParts> = steps
            .flat_map(|step| {
                [column("x", |t| &t.x, step), column("old", |t| &t.old_prediction, step)]
            })
            .collect();
        if forward {
            let parts: Vec<&[f32]> = batches.iter().map(|b| &b.ends[..]).collect();
            let values: usize = parts.iter().map(|p| p.len()).sum();
            tensors.push(TensorParts {
                name: "ends".into(),
                shape: vec![images, values / images],
                parts,
            });
        }
        tensors.push(TensorParts {
            name: "advantages".into(),
            shape: vec![images],
            parts: vec![&self.advantages],
        });
        tensors
    }

    /// The advantages of a part's rows; none where only the KL is taken.
    pub fn advantages_of(&self, part: &Part) -> Vec<f32> {
        if part.images.is_empty() {
            return vec![0.0; part.rows.len()];
        }
        self.advantages[part.images.clone()].to_vec()
    }

    /// What an update's loss is a mean over: its pairs of an image and a step or time.
    pub fn rows(&self, batches: &[&TrajectoryBatch]) -> usize {
        let parts = batches.iter().map(|batch| &batch.part);
        if self.plan.times.is_empty() {
            return parts.map(|part| part.images.len() * part.steps.len()).sum();
        }
        let images = parts.flat_map(|part| part.images.clone());
        images.map(|image| self.plan.times[image].len()).sum()
    }

    /// The same but for the KL: of branches only those count that have an advantage, as published,
    /// where any has.
    pub fn entries(&self, s: &Settings, batches: &[&TrajectoryBatch]) -> usize {
        let images = || batches.iter().flat_map(|batch| batch.part.images.clone());
        let moved = images().filter(|image| self.advantages[*image] != 0.0).count();
        match s.rollout {
            Rollout::Branching(_) if moved > 0 => moved,
            Rollout::Branching(_) | Rollout::Plain(_) => self.rows(batches),
        }
    }

    /// What the epoch leaves in metrics.jsonl once its updates are done; of a skipped update no
    /// statistics count.
    pub fn record(&self, epoch: usize, skipped_updates: usize) -> EpochRecord {
        let Self { rewards, scores, updates, seconds, peaks, rollout_calls, .. } = self;
        let over_updates = |f: fn(&UpdateRecord) -> f64| {
            let taken: Vec<f64> = updates.iter().filter(|u| !u.skipped).map(f).collect();
            taken.iter().sum::<f64>() / taken.len().max(1) as f64
        };
        let images = rewards.len() as f64;
        let reward_mean = rewards.iter().sum::<f64>() / images;
        let variance = rewards.iter().map(|r| (r - reward_mean).powi(2)).sum::<f64>() / images;
        let mib = |bytes: Option<u64>| bytes.map(|b| b >> 20);
        EpochRecord {
            epoch,
            reward_mean,
            reward_std: variance.sqrt(),
            rewards: scores.clone(),
            clip_frac: over_updates(|u| u.clip_frac),
            approx_kl: over_updates(|u| u.approx_kl),
            images_per_second: images / seconds.all(),
            seconds: seconds.all(),
            rollout_seconds: seconds.rollout,
            decode_seconds: seconds.decode,
            reward_seconds: seconds.reward,
            update_seconds: seconds.update,
            rollout_peak_mib: mib(peaks.rollout.process),
            decode_peak_mib: mib(peaks.decode.process),
            update_peak_mib: mib(peaks.update.process),
            rollout_pool_mib: mib(peaks.rollout.pool),
            decode_pool_mib: mib(peaks.decode.pool),
            update_pool_mib: mib(peaks.update.pool),
            skipped_updates,
            rollout_calls: *rollout_calls,
            update_calls: updates.iter().map(|u| u.calls).sum(),
            device_batches: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Restores a suspended epoch from its checkpoint's file: of the tensors what the parts of this
    /// process's devices read.
    ///
    /// # Errors
    /// When the checkpoint does not fit the settings.
    pub fn restore(
        plan: EpochPlan,
        is_mine: impl Fn(&Part) -> bool,
        latent: [usize; 3],
        file: &Weights,
        unfinished: Unfinished,
        seconds: Seconds,
    ) -> Result<Self> {
        let Unfinished { rewards, scores, updates, rollout_calls, .. } = unfinished;
        let images = plan.prompts.len();
        ensure!(
            rewards.len() == images,
            "state.json of the stopped epoch: rewards must be {images} numbers"
        );
        let size = latent.iter().product();
        let tensor = |name: &str, rows: &Range<usize>| {
            file.rows(name, rows.clone(), &[size])
                .context("the stopped epoch does not fit the settings")
        };
        let rows = |part: &str, step: usize, trajectories: &Range<usize>| {
            tensor(&tensor_name(part, step), trajectories)
        };
        let forward = !plan.times.is_empty();
        let batch = |part: &Part| {
            let mine = is_mine(part);
            let transition = |step: usize| {
                let x = rows("x", step, &part.trajectories)?;
                Ok(Transition { x, old_prediction: rows("old", step, &part.trajectories)? })
            };
            let steps = if forward || !mine { 0..0 } else { part.steps.clone() };
            let ends = (forward && mine).then(|| tensor("ends", &part.images)).transpose()?;
            Ok(TrajectoryBatch {
                noise: part.noise(plan.noise),
                latent,
                transitions: steps.map(transition).collect::<Result<_>>()?,
                ends: ends.unwrap_or_default(),
                part: part.clone(),
            })
        };
        Ok(Self {
            batches: plan.parts.iter().map(batch).collect::<Result<_>>()?,
            advantages: file.rows("advantages", 0..images, &[])?,
            rewards,
            scores,
            // Where it was not said, each row was computed.
            rollout_calls: rollout_calls.unwrap_or(images * plan.steps.len()),
            updates,
            seconds,
            peaks: PeakMemory::default(),
            restored: true,
            plan,
        })
    }
}
