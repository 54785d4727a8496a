//! Models from diffusers folders: the networks, their weights and the tokenizers.

pub mod attention;
pub mod blocks;
pub mod clip;
pub mod config;
pub mod denoiser;
pub mod dit;
pub mod flux;
pub mod nn;
pub mod pipeline;
pub mod sd3;
pub mod t5;
pub mod text;
pub mod tokenizer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use denoiser::{Conditioning, Denoiser, Inputs};
pub use pipeline::{Family, Pipeline};
