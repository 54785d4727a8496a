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
mod picture;
mod remote_server;
mod reward;
mod reward_judge;
mod reward_models;
mod reward_remote;
mod score;
mod settings;
mod shaders;
mod support;
mod train;
mod update;
