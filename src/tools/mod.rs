//! What is done with models and devices besides training.

pub mod bench;
pub mod check;
pub mod credit_table;
pub mod errors;
pub mod timing;
