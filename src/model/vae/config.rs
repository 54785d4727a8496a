//! The numbers of diffusers' `AutoencoderKL` and `AutoencoderKLFlux2`.

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::model::blocks::ResnetSpec;
use crate::model::config::{BlockShape, Config};
use crate::model::nn::Activation;
use crate::model::tiles::TILE;

/// Side of the squares of latent pixels that FLUX.2 packs into channels.
pub(super) const PATCH: usize = 2;

/// The numbers of an autoencoder.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    /// Width of each level, from the image inwards.
    pub(super) channels: Vec<usize>,
    /// The same of the decoder.
    pub(super) decoder_channels: Vec<usize>,
    /// Channels of what the decoder takes.
    pub(super) coded_channels: usize,
    /// Resnets of each level.
    pub(super) layers: usize,
    pub(super) groups: usize,
    pub(super) activation: Activation,
    /// Whether its middle attends.
    pub(super) attention: bool,
    pub(super) scaling_factor: f64,
    pub(super) shift_factor: f64,
    pub(super) quant: bool,
    pub(super) post_quant: bool,
    /// force_upcast: in f16 its activations are infinite.
    pub(super) upcast: bool,
    /// eps of the batch norm that latents are packed for, of FLUX.2.
    pub(super) packed: Option<f64>,
}

impl VaeConfig {
    /// Reads a `vae` folder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        /// Each level halves the picture: more would leave nothing of any.
        const MOST_LEVELS: usize = 8;
        c.only(&[("latents_mean", json!(null)), ("latents_std", json!(null))])?;
        let blocks =
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")];
        let mut levels = [0; 2];
        for (count, (field, block)) in levels.iter_mut().zip(blocks) {
            let names = c.names(field, &[block])?;
            *count = names.len();
            for name in names {
                ensure!(
                    name == block,
                    c.bad(field, &format!("holds {name:?}; only {block} is supported"))
                );
            }
        }
        let n = levels[0];
        ensure!(
            levels[1] == n,
            c.bad("up_block_types", &format!("must have {n} blocks, as down_block_types has"))
        );
        ensure!(
            n <= MOST_LEVELS,
            c.bad("down_block_types", &format!("has {n} levels; at most {MOST_LEVELS} are there"))
        );
        let channels = c.widths("block_out_channels", n, if n == 1 { &[64] } else { &[] })?;
        let groups = c.count("norm_num_groups", 32)?;
        let decoder_channels = match &c.json["decoder_block_out_channels"] {
            serde_json::Value::Null => channels.clone(),
            _ => c.widths("decoder_block_out_channels", n, &[])?,
        };
        c.divides("norm_num_groups", groups, &channels)?;
        c.divides("norm_num_groups", groups, &decoder_channels)?;
        let packed = c.json["_class_name"] == "AutoencoderKLFlux2";
        c.only(&[("patch_size", json!([PATCH, PATCH]))])?;
        for field in ["in_channels", "out_channels"] {
            if c.size(field, 3)? != 3 {
                bail!(c.bad(field, "is not supported; images have 3 channels"));
            }
        }
        Ok(Self {
            channels,
            decoder_channels,
            coded_channels: c.width("latent_channels", if packed { 32 } else { 4 })?,
            layers: c.count("layers_per_block", 1)?,
            groups,
            activation: c.activation("act_fn", "silu")?,
            attention: c.flag("mid_block_add_attention", true)?,
            scaling_factor: match packed {
                true => 1.0,
                false => c.positive("scaling_factor", 0.18215)?,
            },
            shift_factor: c.float("shift_factor", 0.0)?,
            quant: c.flag("use_quant_conv", true)?,
            post_quant: c.flag("use_post_quant_conv", true)?,
            upcast: c.flag("force_upcast", false)?,
            packed: match packed {
                true => Some(c.positive("batch_norm_eps", 1e-4)?),
                false => None,
            },
        })
    }

    /// Image pixels a latent pixel, along each side.
    pub fn factor(&self) -> usize {
        self.patch() << (self.channels.len() - 1)
    }

    /// Channels of the latents that a sampler has.
    pub fn latent_channels(&self) -> usize {
        self.coded_channels * self.patch() * self.patch()
    }

    /// Side in latent pixels of a tile that is decoded alone.
    pub fn tile(&self) -> usize {
        TILE / self.patch()
    }

    /// Side of what a latent pixel is of what the decoder takes.
    fn patch(&self) -> usize {
        if self.packed.is_some() { PATCH } else { 1 }
    }

    /// Levels of the decoder, for one latent of a height and width.
    pub fn decoder_shapes(&self, [h, w]: [usize; 2]) -> Vec<BlockShape> {
        let channels = &self.decoder_channels;
        let n = channels.len();
        let area = (h * w * self.patch() * self.patch()) as f64;
        let scores = if self.attention { area * area } else { 0.0 };
        let stream = area * channels[n - 1] as f64;
        let mut blocks = vec![BlockShape { stream, scores, ..Default::default() }];
        for i in 0..n {
            // The first resnet of a level still has the width of the level before.
            let before = if i > 0 { channels[n - i] } else { 0 };
            let width = channels[n - 1 - i].max(before);
            let stream = area * 4f64.powi(i as i32) * width as f64;
            blocks.push(BlockShape { stream, ..Default::default() });
        }
        blocks
    }

    pub(super) fn resnet(&self) -> ResnetSpec {
        ResnetSpec {
            groups: self.groups,
            eps: 1e-6,
            activation: self.activation,
            time: None,
            scale_shift: false,
            output_scale: 1.0,
        }
    }
}
