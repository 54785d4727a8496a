//! Bicubic resizing, with the numbers of the Python libraries that vision towers were trained with.
//!
//! Keys' cubic convolution (a = -0.5), across and then down. A tap's distance is divided by the
//! scale where the picture shrinks, and the taps of a pixel are normalised to a sum of 1.
//! [`resize_rgb8`] is Pillow's to the bit; [`resize_rgb_f32`] is PyTorch's.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use image::RgbImage;

/// The most values that a resized picture may have, and the most between the two passes.
const MOST_VALUES: usize = 100_000_000;

/// Pillow's `Image.resize((width, height), BICUBIC)`, bit for bit: the picture between the passes
/// is rounded to 8 bits, and the weights have 22 bits after the point.
///
/// Compared with Pillow 12.0, which always runs across first. Pillow 13 runs down first where
/// height - new height > max(0, 2 (width - new width)), and then differs by some levels. Where the
/// proportions are kept, those are pictures that shrink and are more than twice as high as wide.
///
/// # Errors
/// When a side is 0, or the result too large for the memory.
pub fn resize_rgb8(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage> {
    let sides = [image.width(), image.height()].map(|side| side as usize);
    let values = resize(image.as_raw(), &whole(sides, [width as usize, height as usize])?)?;
    RgbImage::from_raw(width, height, values).context("a resized picture lacks pixels")
}

/// PyTorch's `interpolate(size, mode="bicubic", antialias=True)` in f32, which is torchvision's
/// `resize` of a tensor: neither rounded nor clipped. Values are \[height, width, 3\].
///
/// # Errors
/// When a side is 0, the values are not as many as `from`'s pixels have, or the result is too large
/// for the memory.
pub fn resize_rgb_f32(values: &[f32], from: [usize; 2], to: [usize; 2]) -> Result<Vec<f32>> {
    let [width, height] = from;
    let count = width.checked_mul(height).and_then(|n| n.checked_mul(3));
    ensure!(count == Some(values.len()), "{} values are no {width}x{height}x3", values.len());
    resize(values, &whole(from, to)?)
}

/// The axes of a resize that keeps every pixel of the result.
fn whole(from: [usize; 2], to: [usize; 2]) -> Result<[Axis; 2]> {
    let named = format!("a resize of {}x{} to {}x{}", from[0], from[1], to[0], to[1]);
    ensure!(from.iter().chain(&to).all(|&side| side > 0), "{named}: a side is 0");
    Ok([0, 1].map(|i| Axis { input: from[i], output: to[i], wanted: 0..to[i] }))
}

/// One side of a resize.
pub(super) struct Axis {
    pub input: usize,
    pub output: usize,
    /// The output's pixels that are computed.
    pub wanted: Range<usize>,
}

/// A colour value, and how weighted values are summed up to a new one.
pub(super) trait Channel: Copy {
    type Sum: Copy;
    /// What a sum begins with.
    const START: Self::Sum;
    /// Rounds what the reference holds in its own type: positions and scales.
    fn rounded(value: f64) -> f64;
    fn weight(weight: f64) -> Self::Sum;
    fn add(sum: Self::Sum, value: Self, weight: Self::Sum) -> Self::Sum;
    fn finish(sum: Self::Sum) -> Self;
}

/// Pillow keeps positions in f64, weights and sums in i32 with 22 bits after the point.
impl Channel for u8 {
    type Sum = i32;
    const START: i32 = 1 << 21;

    fn rounded(value: f64) -> f64 {
        value
    }

    fn weight(weight: f64) -> i32 {
        (weight * f64::from(1 << 22)).round() as i32
    }

    fn add(sum: i32, value: u8, weight: i32) -> i32 {
        sum + i32::from(value) * weight
    }

    fn finish(sum: i32) -> u8 {
        (sum >> 22).clamp(0, 255) as u8
    }
}

/// PyTorch keeps all of them in f32.
impl Channel for f32 {
    type Sum = f32;
    const START: f32 = 0.0;

    fn rounded(value: f64) -> f64 {
        f64::from(value as f32)
    }

    fn weight(weight: f64) -> f32 {
        weight as f32
    }

    fn add(sum: f32, value: f32, weight: f32) -> f32 {
        sum + value * weight
    }

    fn finish(sum: f32) -> f32 {
        sum
    }
}

/// What one pixel of the output is made of: the input's pixels from `first` on, weighted.
struct Taps<W> {
    first: usize,
    weights: Vec<W>,
}

impl<W> Taps<W> {
    fn end(&self) -> usize {
        self.first + self.weights.len()
    }
}

/// The wanted pixels of both axes, across and then down. Values are \[height, width, 3\].
pub(super) fn resize<C: Channel>(values: &[C], [across, down]: &[Axis; 2]) -> Result<Vec<C>> {
    let bounded = |lines: usize| {
        let values = (3 * lines).checked_mul(across.wanted.len());
        ensure!(
            values.is_some_and(|n| n <= MOST_VALUES),
            "a picture of {}x{} cannot be resized to {}x{}: more than {MOST_VALUES} values",
            across.input,
            down.input,
            across.output,
            down.output
        );
        Ok(())
    };
    bounded(down.wanted.len())?;
    let columns = taps::<C>(across);
    let rows = taps::<C>(down);
    let first = rows.iter().map(|t| t.first).min().unwrap_or(0);
    let end = rows.iter().map(Taps::end).max().unwrap_or(0);
    bounded(end - first)?;
    let width = 3 * columns.len();

    let mut narrow = Vec::with_capacity(width * (end - first));
    for row in values.chunks_exact(3 * across.input).take(end).skip(first) {
        for column in &columns {
            let mut sums = [C::START; 3];
            let pixels = row[3 * column.first..].chunks_exact(3);
            for (pixel, &weight) in pixels.zip(&column.weights) {
                sums = [0, 1, 2].map(|c| C::add(sums[c], pixel[c], weight));
            }
            narrow.extend(sums.map(C::finish));
        }
    }

    let mut result = Vec::with_capacity(width * rows.len());
    let mut sums = vec![C::START; width];
    for row in &rows {
        sums.fill(C::START);
        let lines = narrow[width * (row.first - first)..].chunks_exact(width);
        for (line, &weight) in lines.zip(&row.weights) {
            for (sum, &value) in sums.iter_mut().zip(line) {
                *sum = C::add(*sum, value, weight);
            }
        }
        result.extend(sums.iter().map(|&sum| C::finish(sum)));
    }
    Ok(result)
}

/// The taps of the wanted pixels: of `output` pixels that lie evenly over `input` pixels.
/// Pillow's `precompute_coeffs`, and PyTorch's `_compute_indices_min_size_weights_aa`.
fn taps<C: Channel>(axis: &Axis) -> Vec<Taps<C::Sum>> {
    let scale = C::rounded(axis.input as f64 / axis.output as f64);
    let shrink = scale.max(1.0);
    let inverse = C::rounded(1.0 / shrink);
    let support = C::rounded(2.0 * shrink);
    let make = |pixel: usize| {
        let center = C::rounded((pixel as f64 + 0.5) * scale);
        // As a cast to a whole number from f64: what is negative becomes 0.
        let first = (C::rounded(center - support) + 0.5) as usize;
        let end = ((C::rounded(center + support) + 0.5) as usize).min(axis.input);
        let distance = |at: usize| C::rounded(at as f64 - center) + 0.5;
        let weights: Vec<f64> = (first..end).map(|at| cubic(distance(at) * inverse)).collect();
        let total: f64 = weights.iter().sum();
        Taps { first, weights: weights.iter().map(|w| C::weight(w / total)).collect() }
    };
    axis.wanted.clone().map(make).collect()
}

/// Keys' cubic kernel with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    match x.abs() {
        x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        _ => 0.0,
    }
}
