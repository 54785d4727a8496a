//! Models from diffusers folders: the networks, their weights and their text encoders.

pub mod attention;
pub mod blip;
pub mod blocks;
pub mod clip;
pub mod conditioning;
pub mod config;
pub mod denoiser;
pub mod family;
pub mod loader;
pub mod nn;
pub mod picture;
pub mod pipeline;
pub mod reference;
pub mod resize;
pub mod row_map;
pub mod text;
pub mod transformer;
pub mod unet;
pub mod vae;

pub use conditioning::Conditioning;
pub use denoiser::{Denoiser, Inputs};
pub use family::Family;
pub use loader::Storage;
pub use pipeline::Pipeline;
