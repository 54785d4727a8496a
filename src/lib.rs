//! pcpo-wgpu aligns text-to-image diffusion and flow models with a reward by PCPO (Proportionate
//! Credit Policy Optimization, Lee & Ye, ICLR 2026, arXiv 2509.25774) on any GPU that wgpu reaches,
//! and on the CPU.
//!
//! The program `pcpo-wgpu` does all of it from the command line. As a library the crate trains with
//! a reward of one's own:
//!
//! ```no_run
//! use pcpo_wgpu::{Job, Options, Prompt, Reward, RgbImage, Silent, train};
//!
//! struct Brightness;
//!
//! impl Reward for Brightness {
//!     fn score(&mut self, images: &[RgbImage], _: &[&Prompt]) -> anyhow::Result<Vec<f64>> {
//!         let mean = |i: &RgbImage| i.iter().map(|&v| f64::from(v)).sum::<f64>() / i.len() as f64;
//!         Ok(images.iter().map(mean).collect())
//!     }
//! }
//!
//! let settings = Options { model: Some("emoji".into()), ..Default::default() }.resolve()?;
//! let job = Job::new(settings, "runs/bright").with_reward("brightness", Brightness);
//! println!("reward after: {}", train(job, &Silent)?.after);
//! # anyhow::Ok(())
//! ```
//!
//! Whoever changes the crate reads `src/train/mod.rs` first: it tells the whole story.
//! ARCHITECTURE.md draws the flow of data and who may import whom.

#![warn(missing_docs)]

#[doc(hidden)]
pub mod choice;
#[doc(hidden)]
pub mod cli;
pub mod config;
#[doc(hidden)]
pub mod device;
#[doc(hidden)]
pub mod estimate;
#[doc(hidden)]
pub mod io;
#[doc(hidden)]
pub mod kernels;
#[doc(hidden)]
pub mod lora;
#[doc(hidden)]
pub mod measure;
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod ops;
#[doc(hidden)]
pub mod philox;
pub mod reward;
#[doc(hidden)]
pub mod sampling;
#[doc(hidden)]
pub mod schedule;
#[doc(hidden)]
pub mod stop;
#[doc(hidden)]
pub mod tools;
pub mod train;

pub use image::RgbImage;

pub use crate::config::{
    BranchGroup, InitialNoise, Objective, OldDecay, Options, Preset, Rollout, Settings,
};
pub use crate::model::{Pipeline, Storage};
pub use crate::ops::advantage::{Advantage, Mix};
pub use crate::ops::policy_objective::GuidanceGradient;
pub use crate::reward::{JudgeAnswer, Prompt, Reward, RewardSpec};
pub use crate::schedule::credit::{Credit, Total};
pub use crate::schedule::{Grid, Sampler};
pub use crate::train::metrics::EpochRecord;
pub use crate::train::{Event, Job, Observer, Silent, Summary, train};
