//! Rewards: a picture and its prompt to a number, higher is better. The set is open; [`parse`] names what there is.

mod builtin;
mod command;

use anyhow::{Result, bail};
use image::RgbImage;

/// Scores images.
pub trait Reward: Send + Sync {
    /// One number for each image, in order; `prompts[i]` belongs to `images[i]`.
    ///
    /// # Errors
    /// When a score cannot be had, or is not finite.
    fn score(&mut self, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<f64>>;
}

/// Makes the reward that `--reward` names.
///
/// # Errors
/// Names the value and what is supported.
pub fn parse(spec: &str) -> Result<Box<dyn Reward>> {
    let (name, argument) = spec.split_once(':').unwrap_or((spec, ""));
    Ok(match name {
        "jpeg-compressibility" => Box::new(builtin::Jpeg { sign: -1.0 }),
        "jpeg-incompressibility" => Box::new(builtin::Jpeg { sign: 1.0 }),
        "symmetry" => Box::new(builtin::Symmetry),
        "color" => Box::new(builtin::Color::named(argument)?),
        "command" => Box::new(command::Command::start(argument)?),
        _ => bail!(
            "--reward {spec}: unknown; jpeg-compressibility, jpeg-incompressibility, symmetry, color:NAME and \
             command:PROGRAM are there"
        ),
    })
}
