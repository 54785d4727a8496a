//! tmp
pub mod adamw;
pub mod check;
pub mod credit;
pub mod device;
pub mod files;
pub mod lora;
pub mod lora_io;
pub mod model;
pub mod ops;
pub mod philox;
pub mod rollout;
pub mod schedule;
