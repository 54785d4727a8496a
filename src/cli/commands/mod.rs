//! One file a command: its arguments, and what it does with them.

pub mod bench;
pub mod check;
pub mod compare;
pub mod convert;
pub mod credit;
pub mod devices;
pub mod embed;
pub mod eval;
pub mod plan;
pub mod recipes;
pub mod sample;
pub mod score;
pub mod serve;
pub mod train;
