//! All integration tests in one binary: Burn is linked once.

mod architecture;
mod bad_input;
mod command_line;
mod credit;
mod damaged_models;
mod hot_path;
mod lora;
mod model;
mod numbers;
mod reward;
mod settings;
mod shaders;
mod support;
mod train;
mod update;
