//! Pictures for the vision towers of reward models: read, resized, cropped and normalised, with the
//! numbers of the Python libraries that the towers were trained with.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Device, Tensor};
use image::{DynamicImage, ImageFormat, ImageReader, Rgb, RgbImage};
use serde_json::Value;

use super::config::Config;
use super::resize::{Axis, resize};
use crate::device::tensor::upload;

/// OpenAI's mean of CLIP's training pictures, of red, green and blue in 0..1.
pub const CLIP_MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
/// OpenAI's deviation of the same.
pub const CLIP_STD: [f32; 3] = [0.26862954, 0.2613026, 0.2757771];

/// The processors whose defaults [`Preparation::from_json`] knows.
const CLIP_PROCESSORS: [&str; 4] = [
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
];
/// Pillow's number for the bicubic filter.
const BICUBIC: u64 = 3;
/// A larger input than any vision tower has: a number beyond is damage.
const MOST_SIDE: usize = 4096;

/// How a picture of any shape becomes a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The short side becomes `size`, the long one int(size long / short); the middle is cut out,
    /// its corner at floor((side - crop) / 2). transformers' `CLIPImageProcessor`, on Pillow.
    Transformers,
    /// The same resize; the corner is at round((side - crop) / 2), halves to even. torchvision's
    /// `Resize` and `CenterCrop` on Pillow pictures, as open_clip uses them.
    OpenClip,
    /// Both sides become `size`, whatever the picture's shape; the middle is cut out as in
    /// [`Fit::Transformers`]. `CLIPImageProcessor` where `size` is a height and a width.
    Stretch,
    /// The long side becomes `size`, the short one in proportion, as values that are neither
    /// rounded nor clipped; black around it. `ResizeMaxSize` of HPSv2.
    Hps,
}

/// How a picture becomes a vision tower's input. Where a picture is smaller than the crop, black
/// surrounds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Preparation {
    pub fit: Fit,
    /// What `fit` resizes to, in pixels.
    pub size: usize,
    /// The side of the input.
    pub crop: usize,
    /// What the values of 0..255 are multiplied by.
    pub rescale: f64,
    /// What is then taken off the channels.
    pub mean: [f32; 3],
    /// What the channels are then divided by.
    pub std: [f32; 3],
}

impl Preparation {
    /// An input of `size` by `size` with CLIP's mean and deviation.
    pub fn clip(fit: Fit, size: usize) -> Self {
        let (mean, std) = (CLIP_MEAN, CLIP_STD);
        Self { fit, size, crop: size, rescale: 1.0 / 255.0, mean, std }
    }

    /// What a `preprocessor_config.json` of transformers says; absent fields are
    /// `CLIPImageProcessor`'s defaults.
    ///
    /// # Errors
    /// When a field has the wrong type, or asks for what this program does not do; names the file,
    /// the field and its value.
    pub fn from_json(c: &Config) -> Result<Self> {
        let json = &c.json;
        ensure!(json.is_object(), "{}: is not a JSON object", c.path.display());
        for field in ["image_processor_type", "feature_extractor_type"] {
            let known = match &json[field] {
                Value::Null => true,
                value => value.as_str().is_some_and(|name| CLIP_PROCESSORS.contains(&name)),
            };
            let wanted = CLIP_PROCESSORS[0];
            ensure!(known, c.bad(field, &format!("is not supported; {wanted} is")));
        }
        let bicubic = json["resample"].is_null() || json["resample"].as_u64() == Some(BICUBIC);
        ensure!(bicubic, c.bad("resample", "is not supported; 3, which is bicubic, is"));
        ensure!(c.flag("do_resize", true)?, c.bad("do_resize", "is not supported"));
        ensure!(!c.flag("do_pad", false)?, c.bad("do_pad", "is not supported"));
        // Pictures are RGB here, whatever it says.
        c.flag("do_convert_rgb", true)?;

        let (fit, size) = match &json["size"] {
            Value::Null => (Fit::Transformers, 224),
            Value::Number(_) => (Fit::Transformers, side(c, "size", &json["size"])?),
            Value::Object(sides) if sides.contains_key("height") || sides.contains_key("width") => {
                (Fit::Stretch, square(c, "size")?)
            }
            Value::Object(sides) if sides.len() == 1 => {
                (Fit::Transformers, side(c, "size", &json["size"]["shortest_edge"])?)
            }
            _ => bail!(c.bad("size", "is not a side, a shortest_edge, or a height and width")),
        };
        let cropped = c.flag("do_center_crop", true)?;
        let crop = match (&json["crop_size"], cropped, fit) {
            (_, false, Fit::Stretch) => size,
            (_, false, _) => {
                bail!(c.bad("do_center_crop", "needs a size of height and width"))
            }
            (Value::Null, true, _) => 224,
            (Value::Number(_), true, _) => side(c, "crop_size", &json["crop_size"])?,
            (_, true, _) => square(c, "crop_size")?,
        };
        let rescale = match c.flag("do_rescale", true)? {
            true => c.float("rescale_factor", 1.0 / 255.0)?,
            false => 1.0,
        };
        let (mean, std) = match c.flag("do_normalize", true)? {
            true => (c.channels("image_mean", CLIP_MEAN)?, c.channels("image_std", CLIP_STD)?),
            false => ([0.0; 3], [1.0; 3]),
        };
        ensure!(std.iter().all(|&s| s > 0.0), c.bad("image_std", "must be positive"));
        ensure!(rescale > 0.0, c.bad("rescale_factor", "must be positive"));
        Ok(Self { fit, size, crop, rescale, mean, std })
    }

    /// The input, \[3, crop, crop\]: (value x rescale - mean) / std, channel by channel.
    ///
    /// Only the pixels inside the crop are computed, so that a picture of one row costs no more
    /// than a square one.
    ///
    /// # Errors
    /// When the picture has no pixels, or is so narrow that its passes would fill the memory.
    pub fn apply(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let [width, height] = [image.width(), image.height()].map(|side| side as usize);
        ensure!(width > 0 && height > 0, "a picture of {width}x{height} has no pixels");
        let [full_width, full_height] = self.resized(width, height);
        let across = self.placing(full_width);
        let down = self.placing(full_height);
        let rescaled = |&value: &u8| (f64::from(value) * self.rescale) as f32;
        let axes = [
            Axis { input: width, output: full_width, wanted: across.wanted.clone() },
            Axis { input: height, output: full_height, wanted: down.wanted.clone() },
        ];
        let values: Vec<f32> = match self.fit {
            Fit::Transformers | Fit::OpenClip | Fit::Stretch => {
                resize(image.as_raw(), &axes)?.iter().map(rescaled).collect()
            }
            Fit::Hps => {
                let values: Vec<f32> = image.as_raw().iter().map(rescaled).collect();
                resize(&values, &axes)?
            }
        };
        let normalised = |value: f32, c: usize| (value - self.mean[c]) / self.std[c];
        let plane = self.crop * self.crop;
        let mut input: Vec<f32> =
            (0..3).flat_map(|c| std::iter::repeat_n(normalised(0.0, c), plane)).collect();
        for (y, row) in values.chunks_exact(3 * across.wanted.len()).enumerate() {
            for (x, pixel) in row.chunks_exact(3).enumerate() {
                let at = (down.pad + y) * self.crop + across.pad + x;
                (0..3).for_each(|c| input[c * plane + at] = normalised(pixel[c], c));
            }
        }
        Ok(input)
    }

    /// The inputs of several pictures, `[B, 3, crop, crop]`, on a device.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn batch(&self, images: &[RgbImage], device: &Device) -> Result<Tensor<4>> {
        let inputs: Vec<Vec<f32>> = images.iter().map(|i| self.apply(i)).collect::<Result<_>>()?;
        Ok(upload(&inputs.concat(), [images.len(), 3, self.crop, self.crop], device))
    }

    /// Width and height of the whole resized picture. A side that would vanish is 1.
    fn resized(&self, width: usize, height: usize) -> [usize; 2] {
        let size = self.size as f64;
        let (short, long) = (width.min(height) as f64, width.max(height) as f64);
        match self.fit {
            Fit::Transformers | Fit::OpenClip => {
                // In this order of operations, as Python's int(size * long / short).
                let long = (size * long / short) as usize;
                if width <= height { [self.size, long] } else { [long, self.size] }
            }
            Fit::Stretch => [self.size, self.size],
            Fit::Hps => {
                let scale = size / long;
                let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
                [scaled(width).max(1), scaled(height).max(1)]
            }
        }
    }

    /// Where a resized side lies in the crop.
    fn placing(&self, side: usize) -> Placing {
        let (more, less) = (side.saturating_sub(self.crop), self.crop.saturating_sub(side));
        let (skip, pad) = match self.fit {
            Fit::Transformers | Fit::Stretch => (more / 2, less.div_ceil(2)),
            Fit::OpenClip => ((more as f64 / 2.0).round_ties_even() as usize, less / 2),
            Fit::Hps => (more / 2, less / 2),
        };
        Placing { wanted: skip..skip + side.min(self.crop), pad }
    }
}

/// Where a resized side lies in the crop.
struct Placing {
    /// The pixels of the side that are in the crop.
    wanted: Range<usize>,
    /// The black pixels before them.
    pad: usize,
}

/// A side that `value`, the field or a part of it, gives.
fn side(c: &Config, field: &str, value: &Value) -> Result<usize> {
    let side = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let side = side.filter(|n| (1..=MOST_SIDE).contains(n));
    side.ok_or_else(|| c.bad(field, &format!("is not a side of 1 to {MOST_SIDE} pixels")))
}

/// A height and a width that are equal.
fn square(c: &Config, field: &str) -> Result<usize> {
    let value = &c.json[field];
    let (height, width) = (value.get("height"), value.get("width"));
    ensure!(height == width, c.bad(field, "is not a square, which vision towers take"));
    side(c, field, height.unwrap_or(&Value::Null))
}

/// Whether a JPEG's last scan ends: its decoder fills up what is missing with grey.
fn ends(jpeg: &[u8]) -> bool {
    let last = |marker: u8| jpeg.windows(2).rposition(|bytes| bytes == [0xff, marker]);
    last(0xd9) > last(0xda)
}

/// Reads a PNG or a JPEG, which it is by its content and not by its name, as 8-bit RGB.
///
/// Grey becomes grey RGB, 16 bits become 8, and what is transparent shows white behind it. A
/// rotation that a camera noted (EXIF) is ignored, as Pillow's `Image.open` does.
///
/// # Errors
/// When the file is missing or no such picture, or needs more memory than the decoder allows (512
/// MiB); names the file.
pub fn open_rgb(path: &Path) -> Result<RgbImage> {
    let read = || -> Result<DynamicImage> {
        ensure!(path.is_file(), "it is no regular file");
        let bytes = std::fs::read(path)?;
        let reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format()?;
        let cut = reader.format() == Some(ImageFormat::Jpeg) && !ends(&bytes);
        ensure!(!cut, "its end is missing; copy or download it again");
        Ok(reader.decode()?)
    };
    let failed = || format!("{}: is not a PNG or JPEG picture that can be read", path.display());
    let picture = read().with_context(failed)?;
    if !picture.color().has_alpha() {
        return Ok(picture.into_rgb8());
    }
    let picture = picture.into_rgba8();
    let mut flat = RgbImage::new(picture.width(), picture.height());
    for (to, from) in flat.pixels_mut().zip(picture.pixels()) {
        let [red, green, blue, alpha] = from.0.map(u32::from);
        let over_white = |value| ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        *to = Rgb([red, green, blue].map(over_white));
    }
    Ok(flat)
}
