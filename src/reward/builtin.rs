//! Rewards that need no model: DDPO's JPEG size, colour and symmetry.

use anyhow::{Result, bail};
use image::RgbImage;

use super::prompt::Prompt;
use super::score::Reward;
use crate::io;

/// Size in kB of the image as JPEG of quality 95; negative for compressibility (DDPO, Black et al.
/// 2023).
pub struct Jpeg {
    pub sign: f64,
}

impl Reward for Jpeg {
    fn score(&mut self, images: &[RgbImage], _prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let size = |image: &RgbImage| Ok(self.sign * io::jpeg(image, 95)?.len() as f64 / 1000.0);
        images.iter().map(size).collect()
    }
}

/// Minus the mean absolute difference between the image and its mirror image, in [-1, 0].
pub struct Symmetry;

impl Reward for Symmetry {
    fn score(&mut self, images: &[RgbImage], _prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let score = |image: &RgbImage| {
            let mut sum = 0u64;
            for (x, y, pixel) in image.enumerate_pixels() {
                let mirrored = image.get_pixel(image.width() - 1 - x, y);
                sum += pixel
                    .0
                    .iter()
                    .zip(mirrored.0)
                    .map(|(a, b)| u64::from(a.abs_diff(b)))
                    .sum::<u64>();
            }
            -(sum as f64) / (255.0 * image.as_raw().len() as f64)
        };
        Ok(images.iter().map(score).collect())
    }
}

/// Minus the mean distance of the pixels to a colour, over the largest distance there is: in [-1,
/// 0].
pub struct Color {
    rgb: [f64; 3],
}

const COLORS: [(&str, [u8; 3]); 10] = [
    ("black", [0, 0, 0]),
    ("white", [255, 255, 255]),
    ("gray", [128, 128, 128]),
    ("red", [255, 0, 0]),
    ("green", [0, 128, 0]),
    ("blue", [0, 0, 255]),
    ("yellow", [255, 255, 0]),
    ("orange", [255, 165, 0]),
    ("purple", [128, 0, 128]),
    ("pink", [255, 192, 203]),
];

impl Color {
    /// A colour of the CSS names above.
    pub fn named(name: &str) -> Result<Self> {
        match COLORS.iter().find(|(n, _)| *n == name) {
            Some((_, rgb)) => Ok(Self { rgb: rgb.map(f64::from) }),
            None => {
                let names: Vec<&str> = COLORS.iter().map(|(n, _)| *n).collect();
                bail!("unknown colour; one of {}", names.join(", "))
            }
        }
    }
}

impl Reward for Color {
    fn score(&mut self, images: &[RgbImage], _prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let score = |image: &RgbImage| {
            let distance = |p: &image::Rgb<u8>| {
                p.0.iter()
                    .zip(self.rgb)
                    .map(|(&v, c)| (f64::from(v) - c).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            let sum: f64 = image.pixels().map(distance).sum();
            -sum / (f64::from(image.width() * image.height()) * 255.0 * 3f64.sqrt())
        };
        Ok(images.iter().map(score).collect())
    }
}
