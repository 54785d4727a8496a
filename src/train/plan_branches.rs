//! Plans an epoch whose images branch off a few trajectories.

use anyhow::Result;

use super::plan::{EpochPlan, Part, PlanContext, chosen, shares, with_own_total};
use crate::config::{BranchGroup, Branching, Settings};
use crate::model::row_map::RowMap;
use crate::ops::advantage::Advantage;
use crate::philox::{self, Stream};
use crate::reward::Prompt;
use crate::sampling::fleet::Batch;
use crate::sampling::generate::{ImageRequest, InitialLatent};
use crate::sampling::trajectory::Noise;
use crate::schedule::Step;

/// Plans an epoch. Root r has prompt r mod P of those that the epoch chose; images are in the order
/// of updates, steps, roots and branches.
///
/// # Errors
/// When a prompt has no embedding.
pub(super) fn plan_branches(
    s: &Settings,
    b: &Branching,
    context: &PlanContext,
) -> Result<EpochPlan> {
    let PlanContext { epoch, layout, embeddings, steps, .. } = *context;
    let (of_epoch, roots) = (chosen(s, epoch), s.trajectories());
    let prompt = |root: usize| &s.prompt[of_epoch[root % of_epoch.len()]];
    let start = |root: usize| {
        let number = (epoch * roots + root) as u32;
        let initial = InitialLatent::Noise(Stream::InitialNoise, number);
        anyhow::Ok(ImageRequest { prompt: embeddings.row_of(&prompt(root).text)?, initial })
    };
    let (trained, policy_steps) = trained_steps(s, b, context);
    let (mut prompts, mut groups, mut parts) = (Vec::<Prompt>::new(), Vec::new(), Vec::new());
    for update in 0..s.updates_per_epoch {
        let shares = shares(s, layout, update);
        let mut dealt = 0;
        // Devices of one kind can train what any of them has sampled.
        let mut device = |of_share: usize| {
            dealt += 1;
            if layout.alike { (dealt - 1) % layout.devices } else { of_share }
        };
        for (at, (step, k)) in b.steps().enumerate() {
            for Batch { rows: trajectories, device: of_share } in shares.iter().cloned() {
                let begin = prompts.len();
                for root in trajectories.clone() {
                    let prompt = prompt(root);
                    let group = match (s.advantage, b.branch_group) {
                        // What an epoch compares with is the prompt's rewards of earlier ones.
                        (Advantage::PerPrompt, _) => prompt.text.clone(),
                        (_, BranchGroup::Root) => format!("{}\n{step} {root}", prompt.text),
                        (_, BranchGroup::Prompt) => format!("{}\n{step}", prompt.text),
                    };
                    prompts.extend(std::iter::repeat_n(prompt.clone(), k));
                    groups.extend(std::iter::repeat_n(group, k));
                }
                let of: Vec<usize> = (0..trajectories.len() * k).map(|row| row / k).collect();
                parts.push(Part {
                    update,
                    device: device(of_share),
                    images: begin..prompts.len(),
                    steps: at..at + 1,
                    trajectories,
                    rows: RowMap::of_equal(&of),
                });
            }
        }
        for at in policy_steps..trained.len() {
            parts.extend(shares.iter().cloned().map(|share| Part {
                update,
                device: device(share.device),
                images: 0..0,
                steps: at..at + 1,
                rows: RowMap::identity(share.rows.len()),
                trajectories: share.rows,
            }));
        }
    }
    Ok(EpochPlan {
        starts: (0..roots).map(start).collect::<Result<_>>()?,
        noise: Noise { seed: s.seed, first_image: (epoch * prompts.len()) as u32 },
        prompts,
        groups,
        steps: steps.to_vec(),
        trained,
        policy_steps,
        times: Vec::new(),
        parts,
    })
}

/// The steps with branches, with their credit, and their number; behind them those where the KL
/// holds the roots, drawn for the epoch: together they weigh what all steps without branches would.
fn trained_steps(s: &Settings, b: &Branching, context: &PlanContext) -> (Vec<Step>, usize) {
    let PlanContext { epoch, steps, trainable, .. } = *context;
    let mut trained: Vec<Step> = b.steps().map(|(step, _)| steps[step]).collect();
    with_own_total(s, &mut trained);
    trained.iter_mut().zip(b.steps()).for_each(|(step, (_, k))| step.row_weight = b.row_weight(k));
    let policy_steps = trained.len();
    let bare = steps_without_branches(b, trainable);
    let n = b.anchor_steps;
    let mut drawn = philox::choose(s.seed, Stream::TrainSteps, epoch as u32, bare.len(), n);
    drawn.sort_unstable();
    let row_weight = b.mean_branches() * bare.len() as f64 / n as f64;
    trained.extend(drawn.into_iter().map(|i| Step { row_weight, ..steps[bare[i]] }));
    (trained, policy_steps)
}

/// The steps where only the KL can be taken, of those that may be trained.
pub(super) fn steps_without_branches(b: &Branching, trainable: &[usize]) -> Vec<usize> {
    let branches = |step: &usize| b.branch.get(*step).is_some_and(|k| *k > 0);
    trainable.iter().copied().filter(|step| !branches(step)).collect()
}
