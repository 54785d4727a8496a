//! Low-rank adapters: what is trained, and the files that hold it.

pub mod adapter;
pub mod formats;

pub use adapter::{Adapter, LinearShape, Lora};
