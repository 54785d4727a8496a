//! What a run is told: flags over a TOML file over a preset's values over defaults.

pub mod numbers;
pub mod options;
pub mod prompts;
pub mod settings;

pub use options::{InitialNoise, Options, Preset};
pub use settings::Settings;
