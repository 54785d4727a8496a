//! Models from diffusers folders: the networks, their weights and the tokenizer.

pub mod attention;
pub mod blocks;
pub mod clip;
pub mod config;
pub mod nn;
pub mod pipeline;
pub mod tokenizer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use pipeline::{Conditioning, Pipeline};
