//! Models from diffusers folders and single files: the networks, their weights and their text
//! encoders.

pub mod attention;
pub mod blip;
pub mod block_store;
pub mod blocks;
pub mod clip;
pub mod component;
pub mod conditioning;
pub mod config;
pub mod denoiser;
pub mod family;
pub mod files;
mod fingerprint;
pub mod loader;
pub mod nn;
pub mod picture;
pub mod pipeline;
pub mod reference;
pub mod resize;
pub mod resolution;
pub mod row_map;
pub mod single_file;
pub mod text;
pub mod tiles;
mod tokenizers;
pub mod transformer;
pub mod unet;
pub mod vae;

pub use component::Component;
pub use conditioning::Conditioning;
pub use denoiser::{Denoiser, Inputs};
pub use family::Family;
pub use files::{ModelFiles, ModelSpec};
pub use loader::{Storage, Stream};
pub use pipeline::Pipeline;
pub use resolution::Resolution;
