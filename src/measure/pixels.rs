//! What shows in the pixels of a set of pictures when a policy collapses: pictures that become
//! alike, burnt out, overly colourful, grainy or gridded. No network is needed.

use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{mean, squared_deviations};
use crate::io;

/// The quality of the JPEG whose size counts; that of the reward `jpeg`.
const JPEG_QUALITY: u8 = 95;
/// The shares of red, green and blue in grey: luma of ITU-R BT.601.
const LUMA: [f64; 3] = [0.299, 0.587, 0.114];

/// Statistics of a set of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PixelStatistics {
    /// PVS (arXiv 2512.24146, supplement C.2): the deviation over pictures of their mean S of HSV,
    /// plus that of their mean V, plus that of the deviation of grey within a picture; all in 0..1,
    /// population deviations. 0 for copies of one picture.
    pub pvs: f64,
    /// The share of channel values that are 0 or 255.
    pub saturated: f64,
    /// Mean S of HSV, in 0..1.
    pub saturation: f64,
    /// Mean over pictures of the variance of the Laplacian of grey in 0..255, up + down + left +
    /// right - 4 centre, over the pixels that have four neighbours; 0 for a picture without any.
    pub laplacian_variance: f64,
    /// Mean size as JPEG of quality 95, in kB of 1000 bytes.
    pub jpeg_kb: f64,
}

impl PixelStatistics {
    /// Statistics of pictures of any sizes; each picture counts the same, but in `saturated`, where
    /// each value does.
    ///
    /// None without pictures, or where one has no pixels or is too large for a JPEG.
    pub fn of(images: &[RgbImage]) -> Option<Self> {
        let pictures: Vec<Picture> = images.par_iter().map(Picture::of).collect::<Option<_>>()?;
        if pictures.is_empty() {
            return None;
        }
        let column = |of: fn(&Picture) -> f64| -> Vec<f64> { pictures.iter().map(of).collect() };
        let saturation = column(|p| p.saturation);
        let spreads = [&saturation, &column(|p| p.value), &column(|p| p.contrast)];
        let values: usize = images.iter().map(|image| image.as_raw().len()).sum();
        Some(Self {
            pvs: spreads.map(|spread| deviation(spread)).iter().sum(),
            saturated: pictures.iter().map(|p| p.saturated).sum::<usize>() as f64 / values as f64,
            saturation: mean(&saturation),
            laplacian_variance: mean(&column(|p| p.laplacian_variance)),
            jpeg_kb: mean(&column(|p| p.jpeg_kb)),
        })
    }
}

/// Numbers of one picture.
struct Picture {
    /// Mean S of HSV.
    saturation: f64,
    /// Mean V of HSV.
    value: f64,
    /// Deviation of grey in 0..1.
    contrast: f64,
    /// How many channel values are 0 or 255.
    saturated: usize,
    laplacian_variance: f64,
    jpeg_kb: f64,
}

impl Picture {
    /// None for a picture without pixels, or one too large for a JPEG.
    fn of(image: &RgbImage) -> Option<Self> {
        let pixels = f64::from(image.width()) * f64::from(image.height());
        if pixels == 0.0 {
            return None;
        }
        let (mut saturation, mut value) = (0.0, 0.0);
        for pixel in image.pixels() {
            let [red, green, blue] = pixel.0.map(f64::from);
            let (least, most) = (red.min(green).min(blue), red.max(green).max(blue));
            saturation += if most > 0.0 { (most - least) / most } else { 0.0 };
            value += most / 255.0;
        }
        let grey = grey(image);
        Some(Self {
            saturation: saturation / pixels,
            value: value / pixels,
            contrast: deviation(&grey) / 255.0,
            saturated: image.as_raw().iter().filter(|&&v| v == 0 || v == 255).count(),
            laplacian_variance: laplacian_variance(&grey, image.width() as usize),
            jpeg_kb: jpeg_kb(image)?,
        })
    }
}

/// Population standard deviation.
fn deviation(values: &[f64]) -> f64 {
    (squared_deviations(values) / values.len() as f64).sqrt()
}

/// Grey of each pixel in 0..255, not rounded, row by row.
fn grey(image: &RgbImage) -> Vec<f64> {
    let [red, green, blue] = LUMA;
    let luma = |[r, g, b]: [f64; 3]| red * r + green * g + blue * b;
    image.pixels().map(|pixel| luma(pixel.0.map(f64::from))).collect()
}

/// Population variance of the 4-neighbour Laplacian over the inner pixels of a picture `width`
/// wide.
fn laplacian_variance(grey: &[f64], width: usize) -> f64 {
    let height = grey.len() / width;
    let mut laplacian = Vec::with_capacity(grey.len());
    for y in 1..height.saturating_sub(1) {
        for at in y * width + 1..(y + 1) * width - 1 {
            let around = grey[at - width] + grey[at + width] + grey[at - 1] + grey[at + 1];
            laplacian.push(around - 4.0 * grey[at]);
        }
    }
    if laplacian.is_empty() { 0.0 } else { deviation(&laplacian).powi(2) }
}

/// Size as JPEG in kB; None where JPEG has no room for the sides.
fn jpeg_kb(image: &RgbImage) -> Option<f64> {
    Some(io::jpeg(image, JPEG_QUALITY).ok()?.len() as f64 / 1000.0)
}
