//! pcpo-wgpu aligns text-to-image diffusion and flow models with a reward by PCPO (Proportionate Credit Policy Optimization,
//! Lee & Ye, ICLR 2026, arXiv 2509.25774) on any GPU that wgpu reaches, and on the CPU.
//!
//! Read [`train`] first: it tells the whole story. ARCHITECTURE.md draws the flow of data and who may import whom.

pub mod adamw;
pub mod artifacts;
pub mod backward;
pub mod bench;
pub mod check;
pub mod checkpoint;
pub mod choice;
pub mod cli;
mod commands;
pub mod credit;
pub mod credit_table;
pub mod device;
pub mod dump;
mod evaluation;
pub mod files;
pub mod inputs;
pub mod lora;
pub mod lora_io;
pub mod memory;
mod metrics;
pub mod model;
pub mod ops;
pub mod options;
pub mod philox;
pub mod plan;
mod prepare;
pub mod progress;
pub mod reward;
pub mod rollout;
pub mod schedule;
mod self_test;
pub mod settings;
pub mod shapes;
pub mod train;
pub mod update;
mod work;
