//! Flow models' transformers over image and text tokens.

pub mod flux;
pub mod flux2;
pub mod joint;
pub mod rotary;
pub mod sd3;
pub mod z_image;
