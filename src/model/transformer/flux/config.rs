//! The numbers of diffusers' `FluxTransformer2DModel`.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::model::config::{BlockShape, Config, NetworkConfig};
use crate::model::transformer::joint::block_shape;
use crate::model::transformer::rotary::Rotary;

/// FLUX packs 2x2 latent pixels into a token.
pub const PACK: usize = 2;
/// Latent height and width of the pipeline's default, 1024 pixels.
const SAMPLE_SIZE: usize = 128;

/// A transformer's settings.
#[derive(Clone, Debug)]
pub struct FluxConfig {
    pub width: usize,
    pub heads: usize,
    /// Channels of a packed token.
    pub token: usize,
    /// Blocks with weights of their own for text and image, and blocks with one stream.
    pub double: usize,
    pub single: usize,
    /// Of three axes.
    pub rotary: Rotary,
    /// Widths of the sequence and of the pooled text.
    pub context: [usize; 2],
    /// Whether it takes the guidance scale as an input.
    pub guided: bool,
}

impl FluxConfig {
    /// Reads a `transformer` folder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        c.only(&[("patch_size", json!(1))])?;
        let heads = c.count("num_attention_heads", 24)?;
        let head = c.width("attention_head_dim", 128)?;
        let token = c.width("in_channels", 64)?;
        ensure!(token.is_multiple_of(PACK * PACK), c.bad("in_channels", "is not a multiple of 4"));
        ensure!(
            c.size("out_channels", token)? == token,
            c.bad("out_channels", "must be null or in_channels")
        );
        let axes = c.axes("axes_dims_rope", [16, 56, 56], head)?;
        let (double, single) =
            (c.count_or_none("num_layers", 19)?, c.count_or_none("num_single_layers", 38)?);
        ensure!(double + single > 0, c.bad("num_layers", "leaves the network without a block"));
        Ok(Self {
            width: heads * head,
            heads,
            token,
            double,
            single,
            rotary: Rotary { axes, theta: 10_000.0, rounded: false },
            context: [
                c.width("joint_attention_dim", 4096)?,
                c.width("pooled_projection_dim", 768)?,
            ],
            guided: c.flag("guidance_embeds", false)?,
        })
    }
}

impl NetworkConfig for FluxConfig {
    fn latent_shape(&self) -> [usize; 3] {
        [self.token / (PACK * PACK), SAMPLE_SIZE, SAMPLE_SIZE]
    }

    fn context(&self) -> [usize; 2] {
        self.context
    }

    /// dev takes the scale as an input, schnell needs no guidance at all.
    fn distilled(&self) -> bool {
        true
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        (h / PACK) * (w / PACK)
    }

    fn convolves(&self) -> bool {
        false
    }

    fn block_shapes(&self, [h, w]: [usize; 2], text: usize) -> Vec<BlockShape> {
        let block = block_shape((h / PACK) * (w / PACK) + text, self.width, self.heads);
        let single = BlockShape { wide: 1.25 * block.wide, ..block };
        let mut blocks = vec![block; self.double];
        blocks.extend(vec![single; self.single]);
        blocks
    }
}
