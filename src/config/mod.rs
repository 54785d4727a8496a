//! What a run is told: flags over a TOML file over a preset's values over defaults.

#[doc(hidden)]
pub mod numbers;
pub mod options;
#[doc(hidden)]
pub mod prompts;
mod resolve;
pub mod settings;

pub use options::{InitialNoise, Options, Preset};
pub use settings::Settings;
