//! The numbers of diffusers' `Flux2Transformer2DModel`.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::model::config::{BlockShape, Config, NetworkConfig};
use crate::model::transformer::joint::{JointSpec, block_shape};
use crate::model::transformer::rotary::Rotary;

/// Latent height and width of the pipeline's default, 1024 pixels.
const SAMPLE_SIZE: usize = 64;

/// A wider feed-forward than any network has.
const MOST_INNER: usize = 1 << 24;

/// A transformer's settings.
#[derive(Clone, Debug)]
pub struct Flux2Config {
    pub width: usize,
    pub heads: usize,
    /// Channels of a packed token.
    pub token: usize,
    /// Blocks with weights of their own for text and image, and blocks with one stream.
    pub double: usize,
    pub single: usize,
    /// Of four axes.
    pub rotary: Rotary,
    /// Width of the text's tokens.
    pub context: usize,
    /// Width of the feed-forward.
    pub inner: usize,
    /// Width of the sinusoidal embedding of time and guidance.
    pub waves: usize,
    /// Whether it takes the guidance scale as an input.
    pub guided: bool,
    /// Whether its steps were distilled, with guidance in them.
    pub few_steps: bool,
}

impl Flux2Config {
    /// Reads a `transformer` folder's `config.json`, and `is_distilled` of the pipeline's.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        c.only(&[("patch_size", json!(1)), ("eps", json!(1e-6))])?;
        let heads = c.count("num_attention_heads", 48)?;
        let head = c.width("attention_head_dim", 128)?;
        let token = c.width("in_channels", 128)?;
        ensure!(token.is_multiple_of(4), c.bad("in_channels", "is not a multiple of 4"));
        ensure!(
            c.size("out_channels", token)? == token,
            c.bad("out_channels", "must be null or in_channels")
        );
        let axes = c.axes("axes_dims_rope", [32; 4], head)?;
        let (double, single) =
            (c.count_or_none("num_layers", 8)?, c.count_or_none("num_single_layers", 48)?);
        ensure!(double + single > 0, c.bad("num_layers", "leaves the network without a block"));
        let width = heads * head;
        let inner = (width as f64 * c.positive("mlp_ratio", 3.0)?) as usize;
        let what = format!("makes a feed-forward of {inner} out of a width of {width}");
        ensure!((1..=MOST_INNER).contains(&inner), c.bad("mlp_ratio", &what));
        Ok(Self {
            width,
            heads,
            token,
            double,
            single,
            rotary: Rotary { axes, theta: c.positive("rope_theta", 2000.0)?, rounded: false },
            context: c.width("joint_attention_dim", 15360)?,
            inner,
            waves: c.width("timestep_guidance_channels", 256)?,
            guided: c.flag("guidance_embeds", true)?,
            few_steps: c.flag("is_distilled", false)?,
        })
    }

    pub(super) fn spec(&self) -> JointSpec {
        JointSpec { width: self.width, heads: self.heads, qk_norm: true }
    }
}

impl NetworkConfig for Flux2Config {
    fn latent_shape(&self) -> [usize; 3] {
        [self.token, SAMPLE_SIZE, SAMPLE_SIZE]
    }

    fn context(&self) -> [usize; 2] {
        [self.context, 0]
    }

    fn distilled(&self) -> bool {
        self.guided || self.few_steps
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        h * w
    }

    fn convolves(&self) -> bool {
        false
    }

    fn block_shapes(&self, [h, w]: [usize; 2], text: usize) -> Vec<BlockShape> {
        let block = block_shape(h * w + text, self.width, self.heads);
        let stream = |values: usize| block.stream * values as f64 / self.width as f64;
        let double = BlockShape { wide: stream(3 * self.inner), ..block };
        let wide = stream(3 * self.width + 3 * self.inner);
        let mut blocks = vec![double; self.double];
        blocks.extend(vec![BlockShape { wide, ..block }; self.single]);
        blocks
    }
}
