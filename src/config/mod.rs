//! What a run is told: flags over a TOML file over a preset's values over defaults.

mod check;
pub mod choices;
#[doc(hidden)]
pub mod numbers;
pub mod options;
#[doc(hidden)]
pub mod prompts;
pub mod recipe;
mod resolve;
pub mod settings;

pub use choices::{Checkpointing, InitialNoise, LrScheduler, Preset};
pub use options::Options;
pub use settings::Settings;
