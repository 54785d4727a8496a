//! The hot path: every operation is a WGSL shader, its launch, and a CPU reference of the same
//! name. The reference is what the CPU device runs and what the shader is tested against.
//!
//! Predictions are eps or v alike: a [`Coefficients`] holds a step's numbers in prediction units,
//! so that v needs no conversion and stays finite at zero terminal SNR.

pub mod advantage;
pub mod context;
pub mod credit_reduce;
pub mod ddim_step;
pub mod flow_step;
pub mod forward_objective;
pub mod log_ratio;
pub mod philox_noise;
pub mod policy_objective;
pub mod registry;
pub mod sampler_step;
pub mod tensor_ops;

use burn::tensor::Tensor;

pub use self::context::{BLOCK, Coefficients, Guidance, NoiseKey, StepContext, THREADS};
use self::ddim_step::ddim_step;
use self::flow_step::flow_step;
use self::sampler_step::Stepped;

/// The step of the kind that the coefficients belong to.
pub fn step(s: &StepContext, x: &Tensor<4>, model_out: &Tensor<4>) -> Stepped {
    if s.coefficients.flow { flow_step(s, x, model_out) } else { ddim_step(s, x, model_out) }
}
