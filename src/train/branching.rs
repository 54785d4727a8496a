//! Branching (Reward Score Matching, arXiv 2604.17415): a few trajectories without noise, the
//! roots, and images that branch off them by the noise of one step and end without more of it.
//!
//! The branches of a root at a step have one latent and one prompt. What the network says there is
//! the root's own prediction in the rollout, and one call in the update, whose prediction serves
//! the noise and the advantage of each.

use anyhow::Result;

use super::plan::{EpochPlan, Part, shares};
use super::run::Run;
use super::sampled::{Ends, Sampled, Tick, in_rollout};
use super::update::TrajectoryBatch;
use crate::device::tensor::read;
use crate::lora::Adapter;
use crate::ops::{self, Coefficients, Guidance, StepContext};
use crate::sampling::fleet::Batch;
use crate::sampling::generate::{Generated, ImageRequest, InitialLatent, Request, generate};
use crate::sampling::policy::Weighted;
use crate::sampling::trajectory::Transition;
use crate::schedule::Step;

/// Draws the roots, and from them the branches.
pub(super) fn sample(run: &Run, plan: &EpochPlan) -> Result<Sampled> {
    let tree = Tree::new(run, plan);
    in_rollout(run, tree.units(), &|tick| {
        let roots = tree.roots(tick)?;
        let batch = |part: &Part| TrajectoryBatch {
            noise: part.noise(plan.noise),
            latent: run.latent_shape(),
            transitions: part.steps.clone().map(|at| roots.transition(at, part)).collect(),
            ends: Vec::new(),
            part: part.clone(),
        };
        let batches: Vec<TrajectoryBatch> = plan.parts.iter().map(batch).collect();
        let mut calls = roots.calls;
        let mut latents = Vec::new();
        for at in 0..plan.policy_steps {
            let own: Vec<&TrajectoryBatch> = tree.of_step(&batches, at).collect();
            let drawn = tree.branches(at, &own, tick)?;
            calls += drawn.calls;
            // An image a row, since those of a batch may lie apart.
            latents.extend(drawn.ends);
        }
        latents.sort_by_key(|ends| ends.images.rows.start);
        Ok(Sampled { batches, latents, calls })
    })
}

/// What an epoch's trajectories are drawn with.
struct Tree<'a> {
    run: &'a Run<'a>,
    plan: &'a EpochPlan,
    /// All steps without noise.
    quiet: Vec<Step>,
    /// Steps of a root: it ends where nothing of it is needed any more.
    length: usize,
}

/// What the roots leave.
struct Roots {
    /// At each of the plan's trained steps, of all roots.
    transitions: Vec<Transition>,
    number: usize,
    calls: usize,
}

/// What branches leave.
struct Branches {
    /// Of each image that a device of this process drew.
    ends: Vec<Ends>,
    calls: usize,
}

impl Roots {
    /// A part's own of the transitions at a trained step.
    fn transition(&self, at: usize, part: &Part) -> Transition {
        let own = |values: &[f32]| {
            let size = values.len() / self.number;
            values[part.trajectories.start * size..part.trajectories.end * size].to_vec()
        };
        let all = &self.transitions[at];
        Transition { x: own(&all.x), old_prediction: own(&all.old_prediction) }
    }
}

impl<'a> Tree<'a> {
    fn new(run: &'a Run<'a>, plan: &'a EpochPlan) -> Self {
        let quiet = plan.steps.iter().map(Step::without_noise).collect();
        let length = plan.trained.iter().map(|step| step.index + 1).max().unwrap_or(0);
        Self { run, plan, quiet, length }
    }

    /// Batches of rows that the network takes one call each for.
    fn shares(&self, rows: usize) -> Vec<Batch> {
        self.run.fleet.layout.batches(rows, self.run.settings.batch)
    }

    /// The same of the roots: as the updates will read them.
    fn root_shares(&self) -> Vec<Batch> {
        let (s, layout) = (self.run.settings, self.run.fleet.layout);
        (0..s.updates_per_epoch).flat_map(|update| shares(s, layout, update)).collect()
    }

    /// Steps of batches, over all of the rollout.
    fn units(&self) -> usize {
        let plan = self.plan;
        let of_step = |(at, step): (usize, &Step)| {
            let own = plan.parts.iter().filter(|part| part.steps.start == at);
            let images = own.map(|part| part.images.len()).sum();
            self.shares(images).len() * (plan.steps.len() - step.index - 1)
        };
        let branches = plan.trained[..plan.policy_steps].iter().enumerate().map(of_step);
        self.root_shares().len() * self.length + branches.sum::<usize>()
    }

    /// The batches that train one of the trained steps.
    fn of_step<'b>(
        &self,
        batches: &'b [TrajectoryBatch],
        at: usize,
    ) -> impl Iterator<Item = &'b TrajectoryBatch> {
        batches.iter().filter(move |batch| batch.part.steps.start == at)
    }

    /// A request without noise.
    fn request<'b>(
        &'b self,
        images: &'b [ImageRequest],
        batches: &'b [Batch],
        policies: &'b [Weighted<Option<&'b Adapter>>],
        steps: &'b [Step],
    ) -> Result<Request<'b>> {
        Ok(Request {
            images,
            batches,
            embeddings: &self.run.embeddings,
            policies,
            guidance_scale: self.run.settings.guidance_scale,
            steps,
            keep: &[],
            latent: self.run.latent_shape(),
            noise: self.plan.noise,
        })
    }

    fn roots(&self, tick: Tick) -> Result<Roots> {
        let (run, plan) = (self.run, self.plan);
        let keep: Vec<usize> = plan.trained.iter().map(|step| step.index).collect();
        let (shares, policies) = (self.root_shares(), [Weighted::whole(Some(&run.adapter))]);
        let steps = &self.quiet[..self.length];
        let request =
            Request { keep: &keep, ..self.request(&plan.starts, &shares, &policies, steps)? };
        let drawn = generate(&run.fleet, &request, tick, |_, drawn: Generated| {
            Ok((drawn.transitions, drawn.calls))
        });
        // A few rows, which every process reads.
        let own_calls = |(_, (_, calls)): &(usize, (Vec<Transition>, usize))| *calls;
        let calls = drawn.iter().flatten().map(own_calls).sum();
        let drawn = run.fleet.share(drawn)?;
        let nothing = || Transition { x: Vec::new(), old_prediction: Vec::new() };
        // A batch keeps its transitions in sampling order.
        let mut order: Vec<usize> = (0..keep.len()).collect();
        order.sort_by_key(|at| keep[*at]);
        let mut transitions: Vec<Transition> = keep.iter().map(|_| nothing()).collect();
        for (own, _) in drawn {
            for (at, part) in order.iter().zip(own) {
                transitions[*at].x.extend(part.x);
                transitions[*at].old_prediction.extend(part.old_prediction);
            }
        }
        Ok(Roots { transitions, number: plan.starts.len(), calls })
    }

    /// Where the branches of batches at a trained step end.
    fn branches(&self, at: usize, own: &[&TrajectoryBatch], tick: Tick) -> Result<Branches> {
        let (run, plan) = (self.run, self.plan);
        let step = &plan.trained[at];
        let mut images = Vec::new();
        for batch in own {
            let starts = &plan.starts[batch.part.trajectories.clone()];
            let values = self.branch_off(step, batch)?;
            let rows = values.chunks_exact(values.len() / batch.part.rows.len());
            images.extend(rows.zip(batch.part.rows.of()).map(|(values, root)| ImageRequest {
                prompt: starts[*root].prompt,
                initial: InitialLatent::Values(values.to_vec()),
            }));
        }
        let (shares, policies) = (self.shares(images.len()), [Weighted::whole(Some(&run.adapter))]);
        let request = self.request(&images, &shares, &policies, &self.quiet[step.index + 1..])?;
        let drawn = generate(&run.fleet, &request, tick, |_, drawn: Generated| {
            Ok((drawn.images, read(&drawn.latents)?, drawn.calls))
        })?;
        let numbers: Vec<usize> = own.iter().flat_map(|b| b.part.images.clone()).collect();
        let mut found = Branches { ends: Vec::new(), calls: 0 };
        for (share, (images, latents, calls)) in drawn {
            found.calls += calls;
            let device = shares[share].device;
            let rows = latents.chunks_exact(latents.len() / images.len());
            found.ends.extend(numbers[images].iter().zip(rows).map(|(image, row)| Ends {
                images: Batch { rows: *image..*image + 1, device },
                latents: row.to_vec(),
            }));
        }
        Ok(found)
    }

    /// The latents of a batch's rows after their one step with noise, from the prediction that the
    /// roots have made there.
    fn branch_off(&self, step: &Step, batch: &TrajectoryBatch) -> Result<Vec<f32>> {
        let compute = &self.run.first().compute;
        let own = &batch.transitions[0];
        let context = StepContext {
            compute,
            guidance: Guidance::Off,
            coefficients: Coefficients::from(step),
            key: batch.noise.at(step),
        };
        let (x, prediction) =
            (batch.rows(&own.x, &compute.burn), batch.rows(&own.old_prediction, &compute.burn));
        read(&ops::step(&context, &x, &prediction).x_prev)
    }
}
