//! How large pictures are.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// More pixels along a side than any model draws.
const MOST_PIXELS: usize = 16_384;

/// Height and width of pictures in pixels: `512`, or `768x512`; in files a number, or `[768, 512]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolution {
    pub height: usize,
    pub width: usize,
}

impl Resolution {
    /// Height and width.
    pub fn pixels(self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// Height and width of their latents.
    ///
    /// # Errors
    /// When one is no multiple of `factor`, the VAE's pixels a latent pixel.
    pub fn latent(self, factor: usize) -> Result<[usize; 2]> {
        ensure!(
            self.pixels().iter().all(|n| n.is_multiple_of(factor)),
            "--resolution {self}: must be a positive multiple of {factor}"
        );
        Ok(self.pixels().map(|n| n / factor))
    }
}

/// Height and width of latents: those of pictures of a resolution, or those that a network was made
/// for, `[C, H, W]`.
///
/// # Errors
/// As [`Resolution::latent`].
pub fn latent_size(
    given: Option<Resolution>,
    factor: usize,
    [_, height, width]: [usize; 3],
) -> Result<[usize; 2]> {
    given.map_or(Ok([height, width]), |pixels| pixels.latent(factor))
}

impl fmt::Display for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.pixels() {
            [height, width] if height == width => write!(f, "{height}"),
            [height, width] => write!(f, "{height}x{width}"),
        }
    }
}

impl FromStr for Resolution {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let side = |side: &str| {
            let n = side.trim().parse().ok().filter(|n| (1..=MOST_PIXELS).contains(n));
            n.with_context(|| {
                format!("{text:?}: a side or HEIGHTxWIDTH, each from 1 to {MOST_PIXELS} pixels")
            })
        };
        let (height, width) = text.split_once(['x', ',']).unwrap_or((text, text));
        Ok(Self { height: side(height)?, width: side(width)? })
    }
}

impl Serialize for Resolution {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.pixels() {
            [height, width] if height == width => height.serialize(to),
            pixels => pixels.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Resolution {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a side in pixels, or [height, width]")]
        enum Given {
            Side(u32),
            Sides([u32; 2]),
            Text(String),
        }
        let text = match Given::deserialize(from)? {
            Given::Side(side) => side.to_string(),
            Given::Sides([height, width]) => format!("{height}x{width}"),
            Given::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_read_and_written_as_they_were() {
        let wide = Resolution { height: 768, width: 512 };
        assert_eq!("768x512".parse::<Resolution>().unwrap(), wide);
        assert_eq!(wide.to_string(), "768x512");
        assert_eq!(wide.latent(8).unwrap(), [96, 64]);
        assert!(wide.latent(7).is_err());
        #[derive(Serialize, Deserialize)]
        struct File {
            r: Resolution,
        }
        for (text, height, width) in [("r = 64\n", 64, 64), ("r = [64, 32]\n", 64, 32)] {
            let file: File = toml::from_str(text).unwrap();
            assert_eq!(file.r, Resolution { height, width });
            assert_eq!(toml::to_string(&file).unwrap(), text);
        }
        for bad in ["0", "64x", "x64", "-1", "64x64x64", "20000", "nan", "6.5"] {
            assert!(bad.parse::<Resolution>().is_err(), "{bad}");
        }
    }
}
