//! Credit rules: functions from steps to steps. PCPO = Lee & Ye 2026, sections 4 and 5.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::ddim::{Ddim, c1};
use super::{Schedule, Step, StepKind};

/// How strongly each step's change of prediction counts in log rho.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Credit {
    /// w(t) of the sampler itself.
    Native,
    /// In proportion to the part of the trajectory that the step covers, with the total of the
    /// native weights: one constant for all steps of diffusion, zeta dt for those of a flow.
    Proportionate,
    /// The sampler and the constant that PCPO's released diffusion code uses; published for 50
    /// steps only.
    Released,
    /// GRPO-Guard's normalised ratio (Wang et al. 2025, arXiv 2510.22319): log rho without its
    /// quadratic term and times sigma, so that its spread is the same at every step; the loss is
    /// divided by dt.
    Guard,
    /// TempFlow-GRPO's noise weighting (He et al. 2025, arXiv 2508.04324): native weights, each
    /// step's loss in proportion to its noise.
    Noise,
    /// The same with Reward Score Matching's constant (arXiv 2604.17415): the loss times 2.25
    /// sigma.
    Tempflow,
    /// Its form for the log-hinge: log rho times 2.25 sigma, which is what the clip range bounds.
    TempflowRatio,
    /// Reward Score Matching's: log rho times sigma^2, so that one clip range bounds one
    /// displacement at every step, and the loss over sigma^2. The credit is the native one.
    Fairclip,
    /// The same with the loss over sigma dt: equal credit for equal time.
    Fairclip2,
}

/// Over which steps the total credit of `proportionate` is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Total {
    /// The whole grid, whatever is trained, as published.
    All,
    /// The steps that an epoch trains.
    Trained,
}

/// The published w* of the released sampler, and the number by which its objective divides it.
const RELEASED_W: f64 = 4.5;
const RELEASED_DIVISOR: f64 = 8.705_750_761_81;

/// Reward Score Matching's constant for TempFlow-GRPO's weighting.
const TEMPFLOW: f64 = 2.25;

/// Steps that have a density, trained or not.
fn dense(steps: &[Step]) -> impl Iterator<Item = &Step> {
    steps.iter().filter(|s| s.sigma > 0.0 && s.w_total.is_finite())
}

/// Credit per unit of the trajectory, the sum of the native weights over the sum of the shares:
/// zeta for a flow, and N times the mean weight for diffusion.
pub fn zeta(steps: &[Step]) -> f64 {
    let (mut credit, mut share) = (0.0, 0.0);
    for step in dense(steps) {
        credit += step.w_total;
        share += step.share;
    }
    if share > 0.0 { credit / share } else { 0.0 }
}

/// Gives each step its share of `zeta`.
pub fn proportionate(steps: &mut [Step], zeta: f64) {
    for step in steps.iter_mut() {
        step.weight = if step.sigma > 0.0 { zeta * step.share } else { 0.0 };
    }
}

/// Applies a rule to the native steps of a schedule; `total` is a published zeta in place of the
/// grid's own.
///
/// # Errors
/// `released` for a flow or at another number of steps than 50, `guard` and `noise` where the
/// family has none.
pub fn apply(
    rule: Credit,
    schedule: &Schedule,
    mut steps: Vec<Step>,
    total: Option<f64>,
) -> Result<Vec<Step>> {
    ensure!(
        total.is_none() || rule == Credit::Proportionate,
        "--zeta: is the total of --credit proportionate; leave it out with another rule"
    );
    match rule {
        Credit::Native => {}
        Credit::Proportionate => {
            let total = total.unwrap_or_else(|| zeta(&steps));
            proportionate(&mut steps, total);
        }
        Credit::Released => {
            let Schedule::Ddim(ddim) = schedule else {
                anyhow::bail!(
                    "--credit released: is for diffusion models; use --credit proportionate, with \
                     --zeta for a published constant"
                )
            };
            ensure!(
                steps.len() == 50,
                "--credit released: its constants were published for 50 steps, not {}; \
                 use --credit proportionate, which is right at any number of steps",
                steps.len()
            );
            for step in &mut steps {
                *step = released(ddim, step)?;
            }
        }
        Credit::Guard => {
            for step in &mut steps {
                let length = match step.kind {
                    StepKind::Flow { dt, .. } => dt,
                    StepKind::Diffusion { .. } => anyhow::bail!(
                        "--credit guard: is defined for flow models (it divides by dt); use native \
                         or proportionate"
                    ),
                };
                (step.weight, step.quadratic, step.loss_weight) = (step.b, 0.0, 1.0 / length);
            }
        }
        Credit::Noise => {
            let mean =
                dense(&steps).map(|s| s.sigma).sum::<f64>() / dense(&steps).count().max(1) as f64;
            steps
                .iter_mut()
                .for_each(|s| s.loss_weight = if s.sigma > 0.0 { s.sigma / mean } else { 0.0 });
        }
        Credit::Tempflow => {
            steps.iter_mut().for_each(|s| s.loss_weight = TEMPFLOW * s.sigma);
        }
        Credit::TempflowRatio => noisy(&mut steps).for_each(|s| s.scale_ratio(TEMPFLOW * s.sigma)),
        Credit::Fairclip => noisy(&mut steps).for_each(|s| {
            s.scale_ratio(s.sigma * s.sigma);
            s.loss_weight = 1.0 / (s.sigma * s.sigma);
        }),
        Credit::Fairclip2 => noisy(&mut steps).for_each(|s| {
            s.scale_ratio(s.sigma * s.sigma);
            s.loss_weight = 1.0 / (s.sigma * s.share);
        }),
    }
    Ok(steps)
}

fn noisy(steps: &mut [Step]) -> impl Iterator<Item = &mut Step> {
    steps.iter_mut().filter(|s| s.sigma > 0.0)
}

/// sigma~ of the released sampler: the larger root of (c1 + c2) / sigma = w*, although its paper
/// states (c1 - c2).
fn released(ddim: &Ddim, s: &Step) -> Result<Step> {
    let StepKind::Diffusion { alpha_bar, alpha_bar_prev, .. } = s.kind else {
        unreachable!("DDIM makes diffusion steps")
    };
    let c1 = c1(alpha_bar, alpha_bar_prev);
    let w2 = 1.0 + RELEASED_W * RELEASED_W;
    let root = w2 * (1.0 - alpha_bar_prev) - c1 * c1;
    ensure!(
        root >= 0.0,
        "--credit released: no deviation solves the rule at t = {}; use --credit proportionate",
        s.t
    );
    let sigma = (RELEASED_W * c1 + root.sqrt()) / w2;
    let step = ddim.with_sigma(s.t, alpha_bar, alpha_bar_prev, sigma);
    Ok(Step { index: s.index, weight: RELEASED_W / RELEASED_DIVISOR, share: s.share, ..step })
}
