//! Low-rank adapters: what is trained, and the files that hold it.

pub mod adapter;
pub mod formats;
pub mod label;

pub use adapter::{Adapter, LayerShape, Lora};
pub use label::Label;
