//! All integration tests in one binary: Burn is linked once.

mod bad_input;
mod command_line;
mod credit;
mod hot_path;
mod lora;
mod model;
mod shaders;
mod support;
mod train;
mod update;
