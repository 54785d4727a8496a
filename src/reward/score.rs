//! What a reward is, and the check of what it gives.

use anyhow::{Result, anyhow, ensure};
use image::RgbImage;

use super::prompt::Prompt;

/// Scores images.
pub trait Reward: Send {
    /// One number for each image, in order; `prompts[i]` belongs to `images[i]`.
    ///
    /// # Errors
    /// When a score cannot be had, or is not finite.
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>>;
}

/// Scores images and checks what comes back, whoever scores.
///
/// # Errors
/// When the reward fails, gives another number of scores, or one that is not finite.
pub fn score(
    reward: &mut dyn Reward,
    name: &str,
    images: &[RgbImage],
    prompts: &[&Prompt],
) -> Result<Vec<f64>> {
    let scores = reward.score(images, prompts)?;
    ensure!(
        scores.len() == images.len(),
        "the reward {name} gave {} scores for {} images",
        scores.len(),
        images.len()
    );
    if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
        return Err(anyhow!("the reward {name} gave {}, which is not a number", scores[i]));
    }
    Ok(scores)
}
