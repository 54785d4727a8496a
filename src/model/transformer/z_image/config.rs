//! The numbers of diffusers' `ZImageTransformer2DModel`.

use anyhow::Result;
use serde_json::json;

use crate::model::config::{BlockShape, Config, NetworkConfig};
use crate::model::transformer::joint::block_shape;
use crate::model::transformer::rotary::Rotary;

/// A token is 2x2 latent pixels.
pub const PATCH: usize = 2;
/// Tokens that a caption's and a picture's number is a multiple of.
const MULTIPLE: usize = 32;
/// Latent height and width of the pipeline's default, 1024 pixels.
const SAMPLE_SIZE: usize = 128;
/// Width of what modulates blocks, at most.
const MODULATION: usize = 256;

/// A transformer's settings.
#[derive(Clone, Debug)]
pub struct ZImageConfig {
    pub width: usize,
    pub heads: usize,
    pub channels: usize,
    pub layers: usize,
    /// Layers of each of the two refiners.
    pub refiners: usize,
    /// Width of the caption's tokens.
    pub context: usize,
    /// Of three axes: where in the caption, and row and column of the picture.
    pub rotary: Rotary,
    /// Positions along each of the axes.
    pub positions: Vec<usize>,
    pub eps: f64,
    pub qk_norm: bool,
    pub time_scale: f64,
}

impl ZImageConfig {
    /// Reads a `transformer` folder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        c.only(&[
            ("all_patch_size", json!([PATCH])),
            ("all_f_patch_size", json!([1])),
            ("siglip_feat_dim", json!(null)),
        ])?;
        let width = c.width("dim", 3840)?;
        let heads = c.heads("n_heads", 30, width)?;
        let axes = c.axes("axes_dims", [32, 48, 48], width / heads)?;
        Ok(Self {
            width,
            heads,
            channels: c.width("in_channels", 16)?,
            layers: c.count("n_layers", 30)?,
            refiners: c.count_or_none("n_refiner_layers", 2)?,
            context: c.width("cap_feat_dim", 2560)?,
            rotary: Rotary { axes, theta: c.positive("rope_theta", 256.0)?, rounded: true },
            positions: c.widths("axes_lens", 3, &[1024, 512, 512])?,
            eps: c.eps("norm_eps", 1e-5)?,
            qk_norm: c.flag("qk_norm", true)?,
            time_scale: c.float("t_scale", 1000.0)?,
        })
    }

    /// Width of what modulates blocks.
    pub fn modulation(&self) -> usize {
        self.width.min(MODULATION)
    }

    /// Width of the feed-forward; the order of the operations decides how it is rounded.
    pub fn inner(&self) -> usize {
        (self.width as f64 / 3.0 * 8.0) as usize
    }
}

/// So many tokens filled up.
pub fn filled(tokens: usize) -> usize {
    tokens.next_multiple_of(MULTIPLE)
}

impl NetworkConfig for ZImageConfig {
    fn latent_shape(&self) -> [usize; 3] {
        [self.channels, SAMPLE_SIZE, SAMPLE_SIZE]
    }

    fn context(&self) -> [usize; 2] {
        [self.context, 0]
    }

    fn distilled(&self) -> bool {
        false
    }

    /// Its pipeline adds g (c - u) to c: any scale above 0 guides.
    fn guidance(&self, scale: f64) -> f64 {
        1.0 + scale
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        (h / PATCH) * (w / PATCH)
    }

    fn convolves(&self) -> bool {
        false
    }

    fn block_shapes(&self, [h, w]: [usize; 2], text: usize) -> Vec<BlockShape> {
        let (image, text) = (filled((h / PATCH) * (w / PATCH)), filled(text));
        let block = |tokens: usize| {
            let block = block_shape(tokens, self.width, self.heads);
            let wide = block.stream * 2.0 * self.inner() as f64 / self.width as f64;
            BlockShape { wide, ..block }
        };
        let mut blocks = vec![block(image); self.refiners];
        blocks.extend(vec![block(text); self.refiners]);
        blocks.extend(vec![block(image + text); self.layers]);
        blocks
    }
}
