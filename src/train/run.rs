//! A job, a run of it, and what a run tells at its end.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use image::RgbImage;

use super::adamw::AdamWState;
use super::checkpoint::{self, RunState, Snapshot};
use super::epoch::EpochPlan;
use super::evaluation::{EvaluationPlan, Extent, columns, grid};
use super::metrics::{EvaluationRecord, Record};
use super::observer::{Event, Observer};
use super::rewards::{Rewards, Scores};
use super::run_folder::RunFolder;
use crate::config::{Options, Settings};
use crate::io::tensors::TensorParts;
use crate::lora::Adapter;
use crate::lora::formats::{self, Format};
use crate::model::text::embeddings::PromptEmbeddings;
use crate::reward::{Prompt, Reward, RewardSpec};
use crate::sampling::Replica;
use crate::sampling::generate::{Request, generate};
use crate::sampling::trajectory::decode;
use crate::schedule::Step;
use crate::stop;

/// What is to be trained, where the run writes, and what it starts from.
pub struct Job {
    pub(crate) settings: Settings,
    pub(crate) out: PathBuf,
    pub(crate) resume: bool,
    pub(crate) dump: Option<DumpRequest>,
    pub(crate) reward: Option<Box<dyn Reward>>,
}

impl Job {
    /// A new run in the folder `out`, which must not exist or be empty.
    pub fn new(settings: Settings, out: impl Into<PathBuf>) -> Self {
        Self { settings, out: out.into(), resume: false, dump: None, reward: None }
    }

    /// The run in the folder `out` goes on with the settings that it was begun with. Options that
    /// alter none of its numbers, such as `epochs`, may be given anew.
    ///
    /// # Errors
    /// When the folder is not that of a run, or another option is given.
    pub fn resume(options: &Options, out: impl Into<PathBuf>) -> Result<Self> {
        let out = out.into();
        Ok(Self { resume: true, ..Self::new(options.resumed(&out)?, out) })
    }

    /// Scores pictures by a reward of one's own in place of the settings'; `name` is what the run's
    /// folder calls it.
    pub fn with_reward(mut self, name: &str, reward: impl Reward + 'static) -> Self {
        self.settings.reward = vec![RewardSpec::named(name)];
        self.reward = Some(Box::new(reward));
        self
    }

    /// Writes one update whole, so that it can be recomputed outside.
    #[doc(hidden)]
    pub fn with_dump(mut self, dump: Option<DumpRequest>) -> Self {
        self.dump = dump;
        self
    }
}

/// Which update is written whole, and to which file.
#[derive(Clone, Debug, PartialEq)]
pub struct DumpRequest {
    /// Where it is written.
    pub file: PathBuf,
    /// Counted from 1 over the run.
    pub update: usize,
}

impl std::str::FromStr for DumpRequest {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |k: &str| !k.is_empty() && k.bytes().all(|b| b.is_ascii_digit());
        let (file, update) = match text.rsplit_once(':') {
            Some((file, k)) if number(k) => (file, k.parse::<usize>()?),
            _ => (text, 1),
        };
        ensure!(
            update > 0 && !file.is_empty(),
            "--dump-update {text}: give FILE or FILE:K, with K counted from 1"
        );
        Ok(Self { file: file.into(), update })
    }
}

/// What a run tells at its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The run's folder.
    pub out: PathBuf,
    /// Mean reward of the fixed prompts and noise before the first epoch.
    pub before: f64,
    /// The same after the last epoch.
    pub after: f64,
}

/// Pictures of fixed prompts and noise, and their mean reward.
pub(crate) struct Evaluation {
    pub grid: RgbImage,
    pub reward_mean: f64,
    /// The mean of each reward by its name.
    pub rewards: BTreeMap<String, f64>,
}

/// A run in progress.
pub(crate) struct Run<'a> {
    pub settings: &'a Settings,
    pub observer: &'a dyn Observer,
    pub replicas: Vec<Replica>,
    /// Behind a lock: the threads of the devices share the run, and ask no reward.
    pub rewards: Mutex<Rewards>,
    /// Of all prompts that the run draws, and of the empty one.
    pub embeddings: PromptEmbeddings,
    /// All steps of the sampler, with their credit weights.
    pub steps: Vec<Step>,
    /// Indices of the steps that may be trained.
    pub trainable: Vec<usize>,
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub rows_at_once: usize,
    pub state: RunState,
    pub adapter: Adapter,
    pub optimizer: AdamWState,
    pub folder: RunFolder,
    pub dump: Option<DumpRequest>,
    pub skipped_in_a_row: usize,
    /// Whether this process has tested that rho begins at 1.
    pub tested: bool,
    /// The newest state whose pictures were seen to be finite, but for this one.
    pub good: Option<Snapshot>,
    /// What is on disk to continue from, in words.
    pub kept: Option<String>,
}

impl Run<'_> {
    /// The replica that does what is done once.
    pub fn first(&self) -> &Replica {
        &self.replicas[0]
    }

    pub fn latent_shape(&self) -> [usize; 3] {
        self.first().pipeline.latent_shape()
    }

    /// What the next epoch draws.
    pub fn plan_epoch(&self) -> Result<EpochPlan> {
        let (compute, epoch) = (&self.first().compute, self.state.epoch);
        let (steps, trainable) = (&self.steps, &self.trainable);
        EpochPlan::new(self.settings, epoch, compute, &self.embeddings, steps, trainable)
    }

    /// Scores images by all rewards.
    pub fn score(&mut self, images: &[RgbImage], prompts: &[Prompt]) -> Result<Scores> {
        self.rewards.get_mut().expect("no thread panics with it").score(images, prompts)
    }

    /// What an evaluation draws.
    pub fn plan_evaluation(&self, extent: Extent) -> Result<EvaluationPlan> {
        let (steps, embeddings) = (&self.steps, &self.embeddings);
        EvaluationPlan::new(self.settings, self.first(), steps, embeddings, extent)
    }

    /// Draws and scores an evaluation.
    pub fn evaluate(&mut self, extent: Extent) -> Result<Evaluation> {
        let plan = self.plan_evaluation(extent)?;
        let images = self.draw(&plan)?;
        let scores = self.score(&images, &plan.prompts)?;
        let totals = scores.totals();
        let reward_mean = totals.iter().sum::<f64>() / totals.len() as f64;
        let grid = grid(&images, columns(self.settings));
        Ok(Evaluation { grid, reward_mean, rewards: scores.means() })
    }

    /// The pictures of an evaluation, by the adapter as it is.
    pub fn draw(&self, plan: &EvaluationPlan) -> Result<Vec<RgbImage>> {
        let batches: &[Range<usize>] = &plan.batches;
        let request = Request {
            images: &plan.images,
            batches,
            embeddings: &self.embeddings,
            uncond: self.embeddings.row_of("")?,
            adapter: Some(&self.adapter),
            guidance_scale: self.settings.guidance_scale,
            steps: &plan.steps,
            keep: &[],
            latent: self.latent_shape(),
            noise: plan.noise,
        };
        let pictures = generate(&self.replicas, &request, &stop::check, |replica, drawn| {
            decode(&replica.pipeline.vae, &drawn.latents)
        })?;
        Ok(pictures.concat())
    }

    /// Adds an evaluation to what is written next: its grid and its record.
    pub fn show(&mut self, epoch: usize, shown: Evaluation) -> Result<()> {
        let Evaluation { grid, reward_mean, rewards } = shown;
        self.folder.picture(grid_name(epoch), &grid)?;
        let record = EvaluationRecord { epoch, reward_mean, rewards };
        self.folder.record(Record::Evaluation(record));
        Ok(())
    }

    /// The run as it is now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: RunState { optimizer_step: self.optimizer.step, ..self.state.clone() },
            adapter: self.adapter.clone(),
            optimizer: self.optimizer.clone(),
        }
    }

    /// Writes what is pending, the adapter, and the checkpoint of a state.
    pub fn save(&mut self, state: RunState, transitions: Vec<TensorParts>) -> Result<()> {
        let state = RunState { optimizer_step: self.optimizer.step, ..state };
        let network = self.replicas[0].pipeline.family.network();
        let (adapter, optimizer) = (&self.adapter, &self.optimizer);
        let keep = self.settings.keep_every;
        let parts = checkpoint::Parts { state: &state, adapter, optimizer, network };
        self.folder.flush(|dir| {
            let file = dir.join("adapter.safetensors");
            formats::save(adapter, &file, Format::Diffusers, network)?;
            checkpoint::save(dir, &parts, transitions, keep)
        })
    }

    /// Drops the records past a line and the grids past an epoch, written or not, and gives the
    /// records back.
    pub fn forget_after(&mut self, epoch: usize, lines: usize) -> Vec<Record> {
        let later = |path: &Path| grid_epoch(path).is_some_and(|of| of > epoch);
        self.folder.drop_pending(later);
        let grids = std::fs::read_dir(self.folder.dir.join(GRIDS)).into_iter().flatten().flatten();
        for path in grids.map(|entry| entry.path()).filter(|path| later(path)) {
            // The epoch's next grid writes over one that stays.
            let _ = std::fs::remove_file(path);
        }
        self.folder.keep_records(lines)
    }

    pub fn warn(&self, text: &str) {
        self.observer.on(Event::Warning(text));
    }
}

/// The folder of a run's grids.
const GRIDS: &str = "grids";
/// What stands before the number in the name of a grid's file.
const GRID: &str = "epoch-";

/// A grid's file in a run's folder.
fn grid_name(epoch: usize) -> String {
    format!("{GRIDS}/{GRID}{epoch:05}.png")
}

/// The epoch that a grid's file is of.
fn grid_epoch(path: &Path) -> Option<usize> {
    path.file_stem()?.to_str()?.strip_prefix(GRID)?.parse().ok()
}

/// A grid of a run's folder.
pub(crate) fn open_grid(dir: &Path, epoch: usize) -> Result<RgbImage> {
    let path = dir.join(grid_name(epoch));
    let image =
        image::open(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
    Ok(image.to_rgb8())
}
