//! All integration tests in one binary: Burn is linked once.

mod architecture;
mod bad_input;
mod command_line;
mod credit;
mod damaged_models;
mod eval;
mod hot_path;
mod lora;
mod measure;
mod model;
mod numbers;
mod page;
mod picture;
mod remote_server;
mod reward;
mod reward_judge;
mod reward_models;
mod reward_remote;
mod score;
mod serve;
mod settings;
mod shaders;
mod support;
mod tensorboard;
mod train;
mod update;
