//! What a run is told: flags over a TOML file over a preset's values over defaults.

mod check;
pub mod choices;
mod layers;
#[doc(hidden)]
pub mod numbers;
pub mod options;
#[doc(hidden)]
pub mod prompts;
pub mod recipe;
mod resolve;
pub mod rollout;
pub mod settings;

pub use choices::{BranchGroup, InitialNoise, LrScheduler, Objective, OldDecay, Preset, Switch};
pub use options::Options;
pub use rollout::{Branching, Plain, Rollout};
pub use settings::Settings;
