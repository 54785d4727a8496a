//! A run in progress, and what it tells at its end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Result;
use image::RgbImage;

use super::adamw::AdamWState;
use super::base_features::save_base;
use super::checkpoint::{self, Keep, RunState, Snapshot};
use super::evaluation::{EvaluationPlan, Extent};
use super::followers::Followers;
use super::job::DumpRequest;
use super::label::label;
use super::metrics::{EvaluationRecord, Measures, Record};
use super::observer::{Event, Observer};
use super::plan::{EpochPlan, Part, PlanContext};
use super::plan_branches::plan_branches;
use super::plan_images::plan_images;
use super::rewards::{Rewards, Scores};
use super::run_folder::{GRIDS, RunFolder, grid_epoch, grid_name};
use super::watch::{best_epoch, evaluations};
use super::wishes;
use crate::config::{Objective, Rollout, Settings};
use crate::io;
use crate::io::tensors::TensorParts;
use crate::lora::Adapter;
use crate::lora::formats::{self, Format};
use crate::measure::collapse::Bounds;
use crate::measure::features::FeatureModel;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::reward::Prompt;
use crate::sampling::Replica;
use crate::sampling::fleet::{Fleet, Picture};
use crate::sampling::generate::{Request, generate, prompt_pair};
use crate::sampling::kl::trajectory_kl;
use crate::sampling::policy::{PromptPair, Weighted};
use crate::sampling::trajectory::decode;
use crate::schedule::Step;
use crate::stop;

/// What a run tells at its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The run's folder.
    pub out: PathBuf,
    /// Mean reward of the fixed prompts and noise before the first epoch.
    pub before: f64,
    /// The same after the last epoch.
    pub after: f64,
    /// The epoch of the best adapter, `adapter-best.safetensors`, where one was within all bounds.
    pub best_epoch: Option<usize>,
    /// Why the run ended before its last epoch, where its pictures had collapsed.
    pub stopped: Option<String>,
}

/// Pictures of fixed prompts and noise, and what they are like.
pub(crate) struct Evaluation {
    pub grid: RgbImage,
    pub reward_mean: f64,
    /// The mean of each reward by its name.
    pub rewards: BTreeMap<String, f64>,
    /// Of a whole evaluation.
    pub measures: Option<Measures>,
}

/// A run in progress.
pub(crate) struct Run<'a> {
    pub settings: &'a Settings,
    pub observer: &'a dyn Observer,
    pub fleet: Fleet,
    /// Behind a lock: the threads of the devices share the run, and ask no reward.
    pub rewards: Mutex<Rewards>,
    /// Of all prompts that the run draws, and of the empty one.
    pub embeddings: PromptEmbeddings,
    /// All steps of the sampler, with their credit weights.
    pub steps: Vec<Step>,
    /// Indices of the steps that may be trained.
    pub trainable: Vec<usize>,
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub rows_at_once: Option<usize>,
    pub state: RunState,
    pub adapter: Adapter,
    pub optimizer: AdamWState,
    pub followers: Followers,
    pub folder: RunFolder,
    pub dump: Option<DumpRequest>,
    pub skipped_in_a_row: usize,
    /// Whether this process has tested that rho begins at 1.
    pub tested: bool,
    /// The newest state whose pictures were seen to be finite, but for this one.
    pub good: Option<Snapshot>,
    /// What is on disk to continue from, in words.
    pub kept: Option<String>,
    /// What the diversity of pictures is measured by.
    pub features: Option<FeatureModel>,
    /// Features of the first evaluation's pictures, where they are known.
    pub base_features: Option<Vec<Vec<f32>>>,
    /// Where the watch warns and stops.
    pub bounds: Bounds,
    /// The best adapter so far, until it is written.
    pub best: Option<Adapter>,
    /// What was warned of since the last complete epoch.
    pub warnings: Vec<String>,
}

impl Run<'_> {
    /// The replica that does what is done once.
    pub fn first(&self) -> &Replica {
        self.fleet.first()
    }

    pub fn latent_shape(&self) -> [usize; 3] {
        self.first().pipeline.latent_shape()
    }

    /// What the next epoch draws.
    pub fn plan_epoch(&self) -> Result<EpochPlan> {
        let context = PlanContext {
            epoch: self.state.epoch,
            layout: self.fleet.layout,
            embeddings: &self.embeddings,
            steps: &self.steps,
            trainable: &self.trainable,
        };
        match &self.settings.rollout {
            Rollout::Plain(plain) => plan_images(self.settings, plain, &context),
            Rollout::Branching(branching) => plan_branches(self.settings, branching, &context),
        }
    }

    /// What the rows of a part of an epoch are conditioned on, on a replica's device.
    ///
    /// # Errors
    /// When an embedding is damaged.
    pub fn prompts_of(
        &self,
        replica: &Replica,
        plan: &EpochPlan,
        part: &Part,
    ) -> Result<PromptPair> {
        let starts = &plan.starts[part.trajectories.clone()];
        let pair = prompt_pair(replica, &self.embeddings, starts, self.latent_shape())?;
        let rows = part.rows.of();
        Ok(PromptPair { cond: pair.cond.at(rows), uncond: pair.uncond.at(rows) })
    }

    /// Scores images by all rewards: each process its own, whose numbers are `numbers`.
    pub fn score(
        &mut self,
        numbers: &[usize],
        images: &[RgbImage],
        prompts: &[Prompt],
    ) -> Result<Scores> {
        let rewards = self.rewards.get_mut().expect("no thread panics with it");
        rewards.score(&self.fleet.world, numbers, images, prompts)
    }

    /// What an evaluation draws.
    pub fn plan_evaluation(&self, extent: Extent) -> Result<EvaluationPlan> {
        let (steps, embeddings) = (&self.steps, &self.embeddings);
        EvaluationPlan::new(self.settings, &self.fleet, steps, embeddings, extent)
    }

    /// The adapter that is evaluated and given away: the running mean, where the run has one.
    pub fn shown(&self) -> &Adapter {
        self.followers.mean.as_ref().unwrap_or(&self.adapter)
    }

    /// The adapter that rollouts are drawn by: NFT's old policy, or the one that is trained.
    pub fn sampling(&self) -> &Adapter {
        let old = self.followers.old.as_ref();
        old.filter(|_| self.settings.objective == Objective::Nft).unwrap_or(&self.adapter)
    }

    /// The pictures of an evaluation.
    pub fn draw(&self, plan: &EvaluationPlan) -> Result<Vec<RgbImage>> {
        let policies = [Weighted::whole(Some(match plan.extent {
            // Whether the policy itself is still finite.
            Extent::Probe => &self.adapter,
            Extent::Full | Extent::Row => self.shown(),
        }))];
        let request = self.request(plan, &policies)?;
        let pictures = generate(&self.fleet, &request, &|| self.hear_stop(), |replica, drawn| {
            Ok(Picture::list(decode(&replica.pipeline.vae, &drawn.latents)?))
        });
        Ok(self.fleet.share(pictures)?.into_iter().flatten().map(RgbImage::from).collect())
    }

    /// The KL of an evaluation's trajectories to the model without its adapter, by the noise of the
    /// training.
    pub fn kl(&self, plan: &EvaluationPlan) -> Result<f64> {
        let policies = [Weighted::whole(Some(self.shown()))];
        let request = Request { steps: &self.steps, ..self.request(plan, &policies)? };
        let each = trajectory_kl(&self.fleet, &request, &|| self.hear_stop())?;
        Ok(each.iter().sum::<f64>() / each.len() as f64)
    }

    fn request<'a>(
        &'a self,
        plan: &'a EvaluationPlan,
        policies: &'a [Weighted<Option<&'a Adapter>>],
    ) -> Result<Request<'a>> {
        Ok(Request {
            images: &plan.images,
            batches: &plan.batches,
            embeddings: &self.embeddings,
            policies,
            guidance_scale: self.settings.guidance_scale,
            steps: &plan.steps,
            keep: &[],
            latent: self.latent_shape(),
            noise: plan.noise,
        })
    }

    /// Between two updates, where all processes stop together.
    ///
    /// # Errors
    /// When one of them was asked to.
    pub fn hear_stop_together(&self) -> Result<()> {
        self.fleet.world.agree(self.hear_stop())
    }

    /// Between two steps.
    ///
    /// # Errors
    /// When the run was asked to stop, by a signal or by a file in its folder.
    pub fn hear_stop(&self) -> Result<()> {
        // The first of several processes hears the folder for all.
        if self.folder.writes() { wishes::check(&self.folder.dir) } else { stop::check() }
    }

    /// Adds an evaluation to what is written next: its grid and its record, with what the watch
    /// says of it. The best adapter so far is written with it.
    pub fn show(&mut self, epoch: usize, shown: Evaluation) -> Result<()> {
        let Evaluation { grid, reward_mean, rewards, measures } = shown;
        self.folder.picture(grid_name(epoch), &grid)?;
        let (out_of_bounds, collapse) = Default::default();
        let mut record =
            EvaluationRecord { epoch, reward_mean, rewards, measures, out_of_bounds, collapse };
        record.watch(self.settings, &self.bounds, self.folder.records());
        let news = record.news(self.folder.records());
        news.iter().for_each(|text| self.warn(text));
        self.folder.record(Record::Evaluation(record));
        if best_epoch(self.settings, self.folder.records()) == Some(epoch) {
            self.best = Some(self.shown().clone());
        }
        Ok(())
    }

    /// Why the run is to end before its last epoch, where it is.
    pub fn collapsed(&self) -> Option<String> {
        let last = evaluations(self.folder.records()).next_back()?;
        last.reason_to_stop().filter(|_| self.settings.stop_on_collapse).map(String::from)
    }

    /// The run as it is now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: RunState { optimizer_step: self.optimizer.step, ..self.state.clone() },
            adapter: self.adapter.clone(),
            optimizer: self.optimizer.clone(),
            followers: self.followers.clone(),
        }
    }

    /// Takes over the adapter that the first of several processes has stepped.
    pub fn share_adapter(&mut self) -> Result<()> {
        let world = &self.fleet.world;
        if world.size() == 1 {
            return Ok(());
        }
        let own = || (self.optimizer.step, self.adapter.parameters().cloned().collect::<Vec<_>>());
        let (step, values) = world.from_first(world.is_first().then(|| Ok(own())))?;
        self.optimizer.step = step;
        self.adapter.parameters_mut().zip(values).for_each(|(p, v)| *p = v);
        Ok(())
    }

    /// Writes what is pending, the adapter, and the checkpoint of a state.
    pub fn save(&mut self, state: RunState, transitions: Vec<TensorParts>) -> Result<()> {
        let state = RunState { optimizer_step: self.optimizer.step, ..state };
        let label = label(self.settings, self.first(), state.epoch);
        let (adapter, optimizer) = (&self.adapter, &self.optimizer);
        let keep = Keep { last: self.settings.keep_last, every: self.settings.keep_every };
        let followers = &self.followers;
        let parts = checkpoint::Parts { state: &state, adapter, optimizer, followers, label };
        let label = &parts.label;
        let (best, base_features) = (&self.best, &self.base_features);
        let written = self.folder.flush(|dir| {
            let file = dir.join("adapter.safetensors");
            formats::save(adapter, &file, Format::Diffusers, label)?;
            if let Some(ema) = &followers.mean {
                formats::save(ema, &dir.join(EMA), Format::Diffusers, label)?;
            }
            if let Some(best) = best {
                formats::save(best, &dir.join(BEST), Format::Diffusers, label)?;
            }
            save_base(dir, base_features.as_deref())?;
            checkpoint::save(dir, &parts, transitions, keep)
        });
        self.fleet.world.agree(written)?;
        self.best = None;
        self.written();
        Ok(())
    }

    /// Tells that the folder is written.
    pub fn written(&self) {
        let (folder, records) = (&self.folder.dir, self.folder.records());
        self.observer.on(Event::Written { folder, records });
    }

    /// Drops the records past a line and the grids past an epoch, written or not, and gives the
    /// records back.
    pub fn forget_after(&mut self, epoch: usize, lines: usize) -> Vec<Record> {
        let later = |path: &Path| grid_epoch(path).is_some_and(|of| of > epoch);
        self.folder.drop_pending(later);
        if !self.folder.writes() {
            return self.folder.keep_records(lines);
        }
        let grids = std::fs::read_dir(self.folder.dir.join(GRIDS)).into_iter().flatten().flatten();
        for path in grids.map(|entry| entry.path()).filter(|path| later(path)) {
            // The epoch's next grid writes over one that stays.
            let _ = io::disk::remove_file(&path);
        }
        self.folder.keep_records(lines)
    }

    pub fn warn(&mut self, text: &str) {
        self.observer.on(Event::Warning(text));
        self.warnings.push(text.into());
    }
}

/// The file of the adapter's running mean in a run's folder.
pub(super) const EMA: &str = "adapter-ema.safetensors";
/// The file of the best adapter in a run's folder.
pub const BEST: &str = "adapter-best.safetensors";
