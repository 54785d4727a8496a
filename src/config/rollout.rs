//! How an epoch's images come about.

use serde::Serialize;

use super::choices::{BranchGroup, InitialNoise};

/// How an epoch's images come about; in a file the keys of the one or the other.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Rollout {
    /// Each image has a trajectory of its own.
    Plain(Plain),
    /// Images branch off a few trajectories.
    Branching(Branching),
}

/// Each image has a trajectory of its own, some steps of which are trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plain {
    /// A multiple of the group's.
    pub images_per_epoch: usize,
    /// Images of a prompt.
    pub group_size: usize,
    /// Whether a group starts from one latent.
    pub initial_noise: InitialNoise,
    /// None for all that can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_steps: Option<usize>,
    /// Whether they are neighbours.
    pub train_window: bool,
    /// The first part of the steps that they lie in.
    pub train_within: f64,
    /// Whether the last step is one of them.
    pub train_last_step: bool,
    /// Whether the other steps are taken without noise.
    pub noise_only_trained: bool,
}

/// A few trajectories without noise, the roots; at some steps images branch off by that step's
/// noise and end without more of it (Reward Score Matching, arXiv 2604.17415). A branch is trained
/// at its one step with noise.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Branching {
    /// Branches of a root at each of the first steps; none at the rest.
    pub branch: Vec<usize>,
    /// Roots of each of an epoch's prompts.
    pub roots: usize,
    /// Whose rewards are compared.
    pub branch_group: BranchGroup,
    /// Steps without branches where the KL holds the roots, drawn each epoch.
    pub anchor_steps: usize,
}

impl Branching {
    /// Prompts of an epoch at most.
    pub const PROMPTS: usize = 4;

    /// What the published runs have, on any number of steps: for a flow 6, 6, 8 and 10 branches at
    /// the first four of ten steps, for diffusion 4 at five steps spread over fifty.
    pub fn published(flow: bool, steps: usize) -> Vec<usize> {
        let last = steps.saturating_sub(1);
        if flow {
            return [6, 6, 8, 10].into_iter().take(last.max(1)).collect();
        }
        let at: Vec<usize> = (0..5).map(|i| i * steps / 5).filter(|i| *i < last.max(1)).collect();
        let length = at.iter().max().map_or(0, |i| i + 1);
        (0..length).map(|i| if at.contains(&i) { 4 } else { 0 }).collect()
    }

    /// Images of a root.
    pub fn images_per_root(&self) -> usize {
        self.branch.iter().fold(0, |sum: usize, k| sum.saturating_add(*k))
    }

    /// Roots whose branches' rewards are compared at a step.
    pub fn roots_compared(&self) -> usize {
        match self.branch_group {
            BranchGroup::Root => 1,
            BranchGroup::Prompt => self.roots,
        }
    }

    /// The steps with branches, with their number.
    pub fn steps(&self) -> impl Iterator<Item = (usize, usize)> {
        self.branch.iter().copied().enumerate().filter(|(_, k)| *k > 0)
    }

    /// Factor of the rows of a step with `k` branches: all such steps weigh the same.
    pub fn row_weight(&self, k: usize) -> f64 {
        self.mean_branches() / k as f64
    }

    /// Branches of a root at a step that has some, on average.
    pub fn mean_branches(&self) -> f64 {
        self.images_per_root() as f64 / self.steps().count().max(1) as f64
    }
}
