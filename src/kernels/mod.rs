//! Operations of networks that do not train: forward, and the gradient with respect to the input.
//! LoRA freezes the weights, so that no gradient of theirs is computed and their layout is made
//! once, at load. Images are channels last, `[B, H, W, C]`, which is what products and
//! normalisation read in order and what makes an image's pixels tokens without a copy.
//!
//! Each kernel is a WGSL shader, its launch, and a CPU path of the same name. Rollout and update
//! run the same kernels, and a row's result does not depend on the rows beside it: at an update's
//! first step the probability ratio is 1 to the bit.

pub mod activation;
pub mod attention;
mod attention_gpu;
pub mod cpu;
pub mod frozen_conv;
pub mod frozen_linear;
pub mod frozen_weight;
pub mod geglu;
mod gpu;
pub mod group_norm_silu;
pub mod layer_norm;
pub mod low_rank;
mod node;
mod product;
pub mod registry;
pub mod rms_norm;
pub mod rows;
mod strided;
pub mod tensor_ops;
mod threads;
mod vector;
