//! All kernels of the hot path, for validation.

use clap::ValueEnum;

use super::policy_objective::Objective;
use super::{credit_reduce, ddim_step, flow_step, log_ratio, philox_noise, sampler_step};
use crate::device::gpu::Kernel;

/// All kernels; of `policy_objective` one for each objective.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![
        philox_noise::NOISE,
        ddim_step::STEP,
        flow_step::STEP,
        sampler_step::LOG_PROB,
        log_ratio::PARTIALS,
        log_ratio::FINISH,
        credit_reduce::REDUCE,
    ];
    kernels.extend(Objective::value_variants().iter().map(|o| o.kernel()));
    kernels
}
