//! The rewards of a run: those that are trained on, and those that are watched.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use image::RgbImage;

use super::checkpoint::RunState;
use super::metrics::ScoreRecord;
use crate::config::Settings;
use crate::device::Compute;
use crate::measure::bootstrap::means_by_prompt;
use crate::ops::advantage::{Advantage, Weighted, mixed};
use crate::reward::{self, Prompt, Reward, RewardContext, RewardSpec};
use crate::sampling::fleet::in_their_order;
use crate::sampling::world::World;

/// A reward with what it is called and whether it is trained on.
struct Scorer {
    spec: RewardSpec,
    trained: bool,
    reward: Box<dyn Reward>,
}

/// All rewards of a run, in the order of the settings.
pub(crate) struct Rewards(Vec<Scorer>);

/// What images got.
pub(crate) struct Scores(Vec<Column>);

/// What images got from one reward.
struct Column {
    spec: RewardSpec,
    trained: bool,
    scores: Vec<f64>,
}

impl Rewards {
    /// Checks the names of all rewards but one's own, before anything is opened.
    ///
    /// # Errors
    /// Names the flag and the value that is unknown.
    pub fn check(s: &Settings) -> Result<()> {
        let mut named = s.rewards().filter(|r| !r.own);
        named.try_for_each(|spec| reward::find(spec.flag, &spec.reward).map(drop))
    }

    /// Opens the rewards of the settings on a device.
    /// `own` stands for the reward of a library's user.
    ///
    /// # Errors
    /// Names the flag and what is unknown, missing or unreachable.
    pub fn open(s: &Settings, own: Option<Box<dyn Reward>>, compute: &Compute) -> Result<Self> {
        let context =
            RewardContext { compute: compute.clone(), storage: s.storage, remote: s.remote() };
        let scorer = |spec: &RewardSpec, trained: bool| {
            let reward = reward::open(&spec.reward, &context)?;
            anyhow::Ok(Scorer { spec: spec.clone(), trained, reward })
        };
        let mut all: Vec<Scorer> = match own {
            Some(reward) => {
                let [spec] = &s.reward[..] else {
                    anyhow::bail!("a reward of one's own is the only one that is trained on");
                };
                vec![Scorer { spec: spec.clone(), trained: true, reward }]
            }
            None => s.reward.iter().map(|spec| scorer(spec, true)).collect::<Result<_>>()?,
        };
        for spec in &s.watch {
            let opened = scorer(spec, false);
            all.push(opened.with_context(|| format!("--watch {}", spec.shown))?);
        }
        Ok(Self(all))
    }

    /// Scores images by all rewards: each process its own, whose numbers among all are `numbers`;
    /// every process has all scores then.
    ///
    /// # Errors
    /// When a reward fails, or gives something else than a number for each image.
    pub fn score(
        &mut self,
        world: &World,
        numbers: &[usize],
        images: &[RgbImage],
        prompts: &[Prompt],
    ) -> Result<Scores> {
        let own: Vec<&Prompt> = numbers.iter().map(|i| &prompts[*i]).collect();
        let column = |scorer: &mut Scorer| {
            let Scorer { spec, trained, reward } = scorer;
            let scores = match images {
                // A process with more devices than images asks nothing.
                [] => Ok(Vec::new()),
                _ => reward::score(&mut **reward, &spec.shown, images, &own),
            };
            let own = scores.map(|scores| numbers.iter().copied().zip(scores).collect());
            let scores = in_their_order::<f64>(world.all(own)?);
            ensure!(scores.len() == prompts.len(), "{} scores of pictures", scores.len());
            Ok(Column { spec: spec.clone(), trained: *trained, scores })
        };
        let scores = Scores(self.0.iter_mut().map(column).collect::<Result<_>>()?);
        // Their squares are added up as well: what overflows there would be recorded as null.
        for Column { spec, scores, .. } in &scores.0 {
            let squares: f64 = scores.iter().map(|v| (spec.weight * v).powi(2) + v.powi(2)).sum();
            ensure!(
                squares.is_finite(),
                "the reward {} gave numbers so large that they cannot be added up, the first {:e}; \
                 use a smaller weight, or scale its scores",
                spec.shown,
                scores.first().copied().unwrap_or_default()
            );
        }
        Ok(scores)
    }
}

impl Scores {
    fn trained(&self) -> impl Iterator<Item = &Column> {
        self.0.iter().filter(|c| c.trained)
    }

    /// The scores that are trained on.
    fn weighted(&self) -> Vec<Weighted<'_>> {
        self.trained().map(|c| Weighted { weight: c.spec.weight, scores: &c.scores }).collect()
    }

    /// The advantages of an epoch's images; the run's trackers take the scores in.
    pub fn advantages(&self, s: &Settings, state: &mut RunState, prompts: &[&str]) -> Vec<f32> {
        let mut trackers = vec![std::mem::take(&mut state.tracker)];
        trackers.append(&mut state.more_trackers);
        let rewards = self.weighted();
        let found = mixed(s.mix, s.advantage, &rewards, prompts, &mut trackers, s.advantage_clamp);
        state.tracker = trackers.remove(0);
        state.more_trackers = if s.advantage == Advantage::PerPrompt { trackers } else { vec![] };
        found
    }

    /// The weighted sum of each image's scores.
    pub fn totals(&self) -> Vec<f64> {
        let images = self.0.first().map_or(0, |c| c.scores.len());
        let total = |i: usize| self.trained().map(|c| c.spec.weight * c.scores[i]).sum();
        (0..images).map(total).collect()
    }

    /// The mean of each reward for each prompt; `prompt_of[i]` is the number of image i's prompt.
    pub fn by_prompt(&self, prompt_of: &[usize]) -> BTreeMap<String, Vec<f64>> {
        let means = |c: &Column| (c.spec.shown.clone(), means_by_prompt(&c.scores, prompt_of));
        self.0.iter().map(means).collect()
    }

    /// The mean of each reward by its name.
    pub fn means(&self) -> BTreeMap<String, f64> {
        let mean = |c: &Column| c.scores.iter().sum::<f64>() / c.scores.len().max(1) as f64;
        self.0.iter().map(|c| (c.spec.shown.clone(), mean(c))).collect()
    }

    /// What each reward gave by its name; `prompts[i]` is the prompt of image i.
    pub fn records(&self, prompts: &[&str]) -> BTreeMap<String, ScoreRecord> {
        let record = |c: &Column| (c.spec.shown.clone(), ScoreRecord::new(&c.scores, prompts));
        self.0.iter().map(record).collect()
    }
}

/// What a user should hear at once: which rewards teach nothing in an epoch of these records.
pub(crate) fn flat(
    s: &Settings,
    records: &BTreeMap<String, ScoreRecord>,
    advantages: &[f32],
) -> Vec<String> {
    let flat = "does not vary within any group of this epoch: nothing can be learnt from it";
    let is_flat = |r: &&RewardSpec| s.largest_group() > 1 && records[&r.shown].flat_groups == 1.0;
    let told = s.reward.iter().filter(is_flat);
    let told: Vec<String> = told.map(|r| format!("the reward {} {flat}", r.shown)).collect();
    if told.is_empty() && advantages.iter().all(|a| *a == 0.0) {
        let what = if s.reward.len() > 1 { "the sum of the rewards" } else { "the reward" };
        return vec![format!("{what} {flat}")];
    }
    told
}
