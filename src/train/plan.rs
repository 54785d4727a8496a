//! What an epoch draws and trains on: a function of the settings and of its number.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::config::Settings;
use crate::model::row_map::RowMap;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::philox::{self, Stream};
use crate::reward::Prompt;
use crate::sampling::fleet::{Batch, Layout};
use crate::sampling::generate::ImageRequest;
use crate::sampling::trajectory::Noise;
use crate::schedule::Step;
use crate::schedule::credit::{self, Credit, Total};

/// What an epoch samples and trains.
pub(crate) struct EpochPlan {
    /// One for each image.
    pub prompts: Vec<Prompt>,
    /// What each image's reward is compared with: those of the same name.
    pub groups: Vec<String>,
    /// Where each trajectory begins: an image's own, or a root.
    pub starts: Vec<ImageRequest>,
    /// All steps, without noise where only trained ones have it.
    pub steps: Vec<Step>,
    /// The trained steps, with their credit; behind them those where only the KL is taken.
    pub trained: Vec<Step>,
    /// Of them those that train on rewards.
    pub policy_steps: usize,
    /// Of each image the trained steps whose times it is noised to, by an objective of the forward
    /// process.
    pub times: Vec<Vec<usize>>,
    /// What is one batch of an update, in the updates' order.
    pub parts: Vec<Part>,
    pub noise: Noise,
}

/// A batch of an update, as a part of an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Which of the epoch's updates it belongs to.
    pub update: usize,
    /// Which of the job's devices trains it, and samples it where its images have trajectories of
    /// their own.
    pub device: usize,
    /// Its images; none where only the KL is taken.
    pub images: Range<usize>,
    /// Which of the trained steps.
    pub steps: Range<usize>,
    /// Which trajectories' latents it reads.
    pub trajectories: Range<usize>,
    /// Which of these each of its rows is: an image's own, or that of the root it branched off.
    pub rows: RowMap,
}

impl Part {
    /// Images with trajectories of their own, at all trained steps.
    pub fn of_images(update: usize, images: Batch, steps: usize) -> Self {
        let Batch { rows: images, device } = images;
        let rows = RowMap::identity(images.len());
        Self { update, device, trajectories: images.clone(), images, steps: 0..steps, rows }
    }

    /// The noise that its rows draw.
    pub fn noise(&self, of_epoch: Noise) -> Noise {
        Noise { first_image: of_epoch.first_image + self.images.start as u32, ..of_epoch }
    }
}

/// The prompts that an epoch chooses, one a group.
pub(super) fn chosen(s: &Settings, epoch: usize) -> Vec<usize> {
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

/// What an epoch is planned from, besides the settings.
pub(crate) struct PlanContext<'a> {
    /// Counted from 0.
    pub epoch: usize,
    pub layout: Layout,
    pub embeddings: &'a PromptEmbeddings,
    /// All steps of the sampler, with their credit.
    pub steps: &'a [Step],
    /// Indices of those that may be trained.
    pub trainable: &'a [usize],
}

/// The batches of an update, as ranges of the epoch's trajectories.
pub(super) fn shares(s: &Settings, layout: Layout, update: usize) -> Vec<Batch> {
    let each = s.trajectories_per_update();
    let first = update * each;
    let moved = |Batch { rows, device }: Batch| Batch {
        rows: first + rows.start..first + rows.end,
        device,
    };
    layout.batches(each, s.batch).into_iter().map(moved).collect()
}

/// Where the total credit is that of the trained steps, which only the epoch knows.
pub(super) fn with_own_total(s: &Settings, trained: &mut [Step]) {
    if s.credit == Credit::Proportionate && s.credit_total == Total::Trained {
        let total = credit::zeta(trained);
        credit::proportionate(trained, total);
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
