//! An epoch: what it draws, and how far it is. It can be suspended between two updates, so that a
//! stopped run loses no update, and restored to the bit.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::checkpoint::Unfinished;
use super::metrics::{EpochRecord, PeakMemory, ScoreRecord, Seconds, UpdateRecord};
use super::update::TrajectoryBatch;
use crate::config::{InitialNoise, Settings};
use crate::device::Compute;
use crate::io::tensors::TensorParts;
use crate::io::weights::Weights;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::philox::{self, Stream};
use crate::reward::Prompt;
use crate::sampling::generate::{ImageRequest, InitialLatent};
use crate::sampling::parallel::batches;
use crate::sampling::trajectory::{Noise, Transition};
use crate::schedule::Step;
use crate::schedule::credit::{self, Credit, Total};

/// What an epoch samples and trains: a function of the settings and of the epoch's number.
pub(crate) struct EpochPlan {
    /// One for each image: image i has prompt i mod P of those that the epoch chose.
    pub prompts: Vec<Prompt>,
    pub images: Vec<ImageRequest>,
    /// All steps, without noise where only trained ones have it.
    pub steps: Vec<Step>,
    /// The trained steps, with their credit.
    pub trained: Vec<Step>,
    /// Which images are one batch; no batch belongs to two updates.
    pub batches: Vec<Range<usize>>,
    pub noise: Noise,
}

/// The prompts that an epoch chooses, one a group.
fn chosen(s: &Settings, epoch: usize) -> Vec<usize> {
    philox::choose(s.seed, Stream::Prompts, epoch as u32, s.prompt.len(), s.groups())
}

/// All prompts that a run draws in its epochs, in the order of the settings.
pub(crate) fn drawn_prompts(s: &Settings) -> Vec<String> {
    let mut drawn = BTreeSet::new();
    for epoch in 0..s.epochs {
        if drawn.len() == s.prompt.len() {
            break;
        }
        drawn.extend(chosen(s, epoch));
    }
    drawn.into_iter().map(|i| s.prompt[i].text.clone()).collect()
}

impl EpochPlan {
    /// Epoch `epoch`, counted from 0; `steps` and `trainable` are the run's.
    ///
    /// # Errors
    /// When a prompt has no embedding.
    pub fn new(
        s: &Settings,
        epoch: usize,
        compute: &Compute,
        embeddings: &PromptEmbeddings,
        steps: &[Step],
        trainable: &[usize],
    ) -> Result<Self> {
        let (groups, total, per_update) = (s.groups(), s.images_per_epoch, s.images_per_update());
        let chosen = chosen(s, epoch);
        let first = (epoch * total) as u32;
        let prompts: Vec<Prompt> =
            (0..total).map(|i| s.prompt[chosen[i % groups]].clone()).collect();
        let image = |(i, prompt): (usize, &Prompt)| {
            let number = match s.initial_noise {
                InitialNoise::Shared => i % groups,
                InitialNoise::Own => i,
            };
            let initial = InitialLatent::Noise(Stream::InitialNoise, first + number as u32);
            anyhow::Ok(ImageRequest { prompt: embeddings.row_of(&prompt.text)?, initial })
        };
        let update = batches(compute, per_update, s.batch);
        let starts = (0..total).step_by(per_update);
        let trained = trained_steps(s, epoch, steps, trainable);
        let noisy = |step: &Step| {
            let quiet = s.noise_only_trained && trained.iter().all(|t| t.index != step.index);
            if quiet { step.without_noise() } else { *step }
        };
        Ok(Self {
            images: prompts.iter().enumerate().map(image).collect::<Result<_>>()?,
            prompts,
            steps: steps.iter().map(noisy).collect(),
            batches: starts
                .flat_map(|start| update.iter().map(move |b| start + b.start..start + b.end))
                .collect(),
            noise: Noise { seed: s.seed, first_image: first },
            trained,
        })
    }
}

/// The steps that an epoch trains: all, some at random, or a window at a random place; with their
/// credit.
fn trained_steps(s: &Settings, epoch: usize, steps: &[Step], trainable: &[usize]) -> Vec<Step> {
    let k = s.train_steps.unwrap_or(trainable.len());
    let draw = |n, k| philox::choose(s.seed, Stream::TrainSteps, epoch as u32, n, k);
    let mut positions = if s.train_window {
        let start = draw(trainable.len() - k + 1, 1)[0];
        (start..start + k).collect()
    } else {
        draw(trainable.len(), k)
    };
    positions.sort_unstable();
    let mut trained: Vec<Step> = positions.into_iter().map(|p| steps[trainable[p]]).collect();
    if s.credit == Credit::Proportionate && s.credit_total == Total::Trained {
        let total = credit::zeta(&trained);
        credit::proportionate(&mut trained, total);
    }
    trained
}

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
    /// What a checkpoint keeps of an epoch that is suspended, from where it lies.
    pub fn tensors(&self) -> Vec<TensorParts<'_>> {
        let images = self.rewards.len();
        let column = |part: &str, of: fn(&Transition) -> &Vec<f32>, step: usize| {
            let parts: Vec<&[f32]> =
                self.batches.iter().map(|b| &of(&b.transitions[step])[..]).collect();
            let values: usize = parts.iter().map(|p| p.len()).sum();
            TensorParts {
                name: tensor_name(part, step),
                shape: vec![images, values / images],
                parts,
            }
        };
        let steps = 0..self.plan.trained.len();
        let mut tensors: Vec<TensorParts> = steps
            .flat_map(|step| {
                [column("x", |t| &t.x, step), column("old", |t| &t.old_prediction, step)]
            })
            .collect();
        tensors.push(TensorParts {
            name: "advantages".into(),
            shape: vec![images],
            parts: vec![&self.advantages],
        });
        tensors
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
            rollout_peak_mib: mib(peaks.rollout),
            decode_peak_mib: mib(peaks.decode),
            update_peak_mib: mib(peaks.update),
            skipped_updates,
            rollout_calls: *rollout_calls,
            update_calls: updates.iter().map(|u| u.calls).sum(),
            warnings: Vec::new(),
        }
    }

    /// Restores a suspended epoch from its checkpoint's file.
    ///
    /// # Errors
    /// When the checkpoint does not fit the settings.
    pub fn restore(
        plan: EpochPlan,
        latent: [usize; 3],
        file: &Weights,
        unfinished: Unfinished,
        seconds: Seconds,
    ) -> Result<Self> {
        let Unfinished { rewards, scores, updates, rollout_calls, .. } = unfinished;
        let images = plan.images.len();
        ensure!(
            rewards.len() == images,
            "state.json of the stopped epoch: rewards must be {images} numbers"
        );
        let size = latent.iter().product();
        let rows = |part: &str, step: usize, images: &Range<usize>| {
            file.rows(&tensor_name(part, step), images.clone(), &[size])
                .context("the stopped epoch does not fit the settings")
        };
        let batch = |images: &Range<usize>| {
            let transition = |step: usize| {
                let x = rows("x", step, images)?;
                Ok(Transition { x, old_prediction: rows("old", step, images)? })
            };
            let [c, h, w] = latent;
            let noise =
                Noise { first_image: plan.noise.first_image + images.start as u32, ..plan.noise };
            Ok(TrajectoryBatch {
                images: images.clone(),
                noise,
                shape: [images.len(), c, h, w],
                transitions: (0..plan.trained.len()).map(transition).collect::<Result<_>>()?,
            })
        };
        Ok(Self {
            batches: plan.batches.iter().map(batch).collect::<Result<_>>()?,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    /// The prompts that are encoded before a run are those that its epochs choose, each once.
    #[test]
    fn the_prompts_of_a_run_are_known_before_it_begins() {
        let prompts: Vec<String> = (0..200).map(|i| format!("prompt {i}")).collect();
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/simple");
        let options = |epochs: usize| Options {
            model: Some(model.clone()),
            reward: Some(vec!["symmetry".into()]),
            prompt: Some(prompts.clone()),
            epochs: Some(epochs),
            ..Default::default()
        };
        let few = options(5).resolve().unwrap();
        let drawn = drawn_prompts(&few);
        let unique: BTreeSet<&String> = drawn.iter().collect();
        assert_eq!(unique.len(), drawn.len(), "each once");
        assert!(drawn.len() > 4 && drawn.len() <= 5 * few.groups(), "{}", drawn.len());
        for epoch in 0..5 {
            let own = chosen(&few, epoch).into_iter().map(|i| few.prompt[i].text.clone());
            assert!(own.into_iter().all(|prompt| drawn.contains(&prompt)), "epoch {epoch}");
        }
        assert_eq!(drawn_prompts(&options(1000).resolve().unwrap()).len(), 200);
    }
}
