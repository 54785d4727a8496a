//! What a run is told: flags over a TOML file over a preset's values over defaults.

pub mod checkpointing;
#[doc(hidden)]
pub mod numbers;
pub mod options;
#[doc(hidden)]
pub mod prompts;
mod resolve;
pub mod settings;

pub use checkpointing::Checkpointing;
pub use options::{InitialNoise, Options, Preset};
pub use settings::Settings;
