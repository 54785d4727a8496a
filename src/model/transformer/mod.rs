//! Flow models' transformers over image and text tokens.

pub mod flux;
pub mod joint;
pub mod sd3;
