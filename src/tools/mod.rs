//! What is done with models and devices besides training.

pub mod bench;
pub mod bench_kernels;
pub mod check;
pub mod compare;
pub mod convert;
pub mod credit_table;
pub mod draw;
pub mod errors;
pub mod eval;
pub mod report;
pub mod serve;
pub mod tensorboard;
pub mod timing;
