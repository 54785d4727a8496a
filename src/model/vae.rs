//! diffusers' `AutoencoderKL`: decode for the images, encode for checks.

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};
use serde_json::json;

use super::attention::Attention;
use super::blocks::{Downsample, Resnet, ResnetSpec, Upsample};
use super::component::Component;
use super::config::{BlockShape, Config};
use super::loader::{Loader, Storage};
use super::nn::{Activation, Conv2d, GroupNorm, channels_first, channels_last};
use super::tiles::tiled;

/// The numbers of an `AutoencoderKL`.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    /// Width of each level, from the image inwards.
    pub channels: Vec<usize>,
    pub latent_channels: usize,
    /// Resnets of each level.
    layers: usize,
    groups: usize,
    activation: Activation,
    /// Whether its middle attends.
    attention: bool,
    scaling_factor: f64,
    shift_factor: f64,
    quant: bool,
    post_quant: bool,
    /// force_upcast: in f16 its activations are infinite.
    upcast: bool,
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
        c.divides("norm_num_groups", groups, &channels)?;
        for field in ["in_channels", "out_channels"] {
            if c.size(field, 3)? != 3 {
                bail!(c.bad(field, "is not supported; images have 3 channels"));
            }
        }
        Ok(Self {
            channels,
            latent_channels: c.width("latent_channels", 4)?,
            layers: c.count("layers_per_block", 1)?,
            groups,
            activation: c.activation("act_fn", "silu")?,
            attention: c.flag("mid_block_add_attention", true)?,
            scaling_factor: c.positive("scaling_factor", 0.18215)?,
            shift_factor: c.float("shift_factor", 0.0)?,
            quant: c.flag("use_quant_conv", true)?,
            post_quant: c.flag("use_post_quant_conv", true)?,
            upcast: c.flag("force_upcast", false)?,
        })
    }

    /// Image pixels a latent pixel, along each side.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// Levels of the decoder, for one latent of a height and width.
    pub fn decoder_shapes(&self, [h, w]: [usize; 2]) -> Vec<BlockShape> {
        let n = self.channels.len();
        let area = h as f64 * w as f64;
        let scores = if self.attention { area * area } else { 0.0 };
        let stream = area * self.channels[n - 1] as f64;
        let mut blocks = vec![BlockShape { stream, scores, ..Default::default() }];
        for i in 0..n {
            // The first resnet of a level still has the width of the level before.
            let before = if i > 0 { self.channels[n - i] } else { 0 };
            let width = self.channels[n - 1 - i].max(before);
            let stream = area * 4f64.powi(i as i32) * width as f64;
            blocks.push(BlockShape { stream, ..Default::default() });
        }
        blocks
    }

    fn resnet(&self) -> ResnetSpec {
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

/// Which way a [`Coder`] goes.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Encode,
    Decode,
}

/// A resnet level with its change of size.
struct Level {
    resnets: Vec<Resnet>,
    down: Option<Downsample>,
    up: Option<Upsample>,
}

struct MidAttention {
    norm: GroupNorm,
    attention: Attention,
}

impl MidAttention {
    fn load(l: &Loader, groups: usize, c: usize) -> Result<Self> {
        // Files from before diffusers 0.18 name the projections differently.
        let old = l.has("query.weight");
        let names = if old {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        Ok(Self {
            norm: GroupNorm::load(l, "group_norm", groups, c, 1e-6)?,
            attention: Attention::load(l, names, c, c, 1)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let y = self.norm.forward(x.clone()).reshape([b, h * w, c]);
        x + self.attention.forward(y, None, None, None).reshape([b, h, w, c])
    }
}

/// Encoder or decoder: they differ in the order of their parts only.
struct Coder {
    conv_in: Conv2d,
    mid: [Resnet; 2],
    attention: Option<MidAttention>,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Level {
    /// Level `i` in the order in which it runs.
    fn load(l: &Loader, c: &VaeConfig, way: Way, i: usize) -> Result<Self> {
        let n = c.channels.len();
        let width = |i: usize| match way {
            Way::Encode => c.channels[i],
            Way::Decode => c.channels[n - 1 - i],
        };
        let (cin, cout, resize) = (width(i.saturating_sub(1)), width(i), i + 1 < n);
        let (part, layers) = match way {
            Way::Encode => ("down", c.layers),
            Way::Decode => ("up", c.layers + 1),
        };
        let l = l.at(format!("{part}_blocks.{i}"));
        let resnet = |j: usize| {
            let first = if j == 0 { cin } else { cout };
            Resnet::load(&l.at(format!("resnets.{j}")), first, cout, c.resnet())
        };
        let mut level =
            Self { resnets: (0..layers).map(resnet).collect::<Result<_>>()?, down: None, up: None };
        match way {
            Way::Encode if resize => {
                level.down = Some(Downsample::load(&l.at("downsamplers.0"), cout, 0)?);
            }
            Way::Decode if resize => {
                level.up = Some(Upsample::load(&l.at("upsamplers.0"), cout)?);
            }
            Way::Encode | Way::Decode => {}
        }
        Ok(level)
    }
}

impl Coder {
    fn load(root: &Loader, c: &VaeConfig, way: Way) -> Result<Self> {
        let n = c.channels.len();
        let (shallow, deep) = (c.channels[0], c.channels[n - 1]);
        let (part, input, output, first, last) = match way {
            Way::Encode => ("encoder", 3, 2 * c.latent_channels, shallow, deep),
            Way::Decode => ("decoder", c.latent_channels, 3, deep, shallow),
        };
        let l = root.at(part);
        let mid = |j: usize| {
            Resnet::load(&l.at(format!("mid_block.resnets.{j}")), deep, deep, c.resnet())
        };
        let attention = if c.attention {
            Some(MidAttention::load(&l.at("mid_block.attentions.0"), c.groups, deep)?)
        } else {
            None
        };
        Ok(Self {
            conv_in: Conv2d::same(&l, "conv_in", input, first)?,
            mid: [mid(0)?, mid(1)?],
            attention,
            levels: (0..n).map(|i| Level::load(&l, c, way, i)).collect::<Result<_>>()?,
            norm_out: GroupNorm::load(&l, "conv_norm_out", c.groups, last, 1e-6)?,
            conv_out: Conv2d::same(&l, "conv_out", last, output)?,
        })
    }

    fn mid(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.mid[0].forward(x, None, None);
        let x = match &self.attention {
            Some(attention) => attention.forward(x),
            None => x,
        };
        self.mid[1].forward(x, None, None)
    }

    fn levels(&self, mut x: Tensor<4>) -> Tensor<4> {
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(x, None, None);
            }
            if let Some(down) = &level.down {
                x = down.forward(x, None);
            }
            if let Some(up) = &level.up {
                x = up.forward(x, None, None);
            }
        }
        x
    }

    fn out(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv_out.forward(self.norm_out.activated(x, Activation::Silu))
    }
}

/// The image autoencoder.
pub struct Vae {
    /// Latents are divided by this before decoding, and shifted by that.
    pub scaling_factor: f64,
    pub shift_factor: f64,
    pub latent_channels: usize,
    /// Image pixels a latent pixel, along each side.
    pub factor: usize,
    /// Side in latent pixels of the tiles that it decodes one by one, where it does.
    pub tile: Option<usize>,
    encoder: Coder,
    quant: Option<Conv2d>,
    post_quant: Option<Conv2d>,
    decoder: Coder,
}

impl Vae {
    /// Loads a `vae`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(part: &Component, device: &Device, storage: Storage) -> Result<Self> {
        let c = VaeConfig::read(&part.config)?;
        let weights = part.weights()?;
        let root = Loader::new(&weights, device, storage).exactly(c.upcast);
        let latent = c.latent_channels;
        let one = |wanted: bool, part: &str, width: usize| {
            let conv = wanted.then(|| Conv2d::point(&root, part, width, width));
            conv.transpose()
        };
        Ok(Self {
            scaling_factor: c.scaling_factor,
            shift_factor: c.shift_factor,
            latent_channels: latent,
            factor: c.factor(),
            encoder: Coder::load(&root, &c, Way::Encode)?,
            quant: one(c.quant, "quant_conv", 2 * latent)?,
            post_quant: one(c.post_quant, "post_quant_conv", latent)?,
            decoder: Coder::load(&root, &c, Way::Decode)?,
            tile: None,
        })
    }

    /// Latents `[B, C, h, w]` as the sampler has them -> images `[B, 3, H, W]`, not clamped, around
    /// [-1, 1]; in tiles where it has them.
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        match self.tile {
            Some(tile) => tiled(latents, tile, self.factor, |part| self.decode_whole(part)),
            None => self.decode_whole(latents),
        }
    }

    fn decode_whole(&self, latents: Tensor<4>) -> Tensor<4> {
        let z = channels_last(latents / self.scaling_factor + self.shift_factor);
        let z = match &self.post_quant {
            Some(conv) => conv.forward(z),
            None => z,
        };
        let d = &self.decoder;
        let x = d.mid(d.conv_in.forward(z));
        channels_first(d.out(d.levels(x)))
    }

    /// Images `[B, 3, H, W]` in [-1, 1] -> the mean of the latent distribution, scaled, `[B, C, h,
    /// w]`.
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        let e = &self.encoder;
        let x = e.levels(e.conv_in.forward(channels_last(images)));
        let moments = e.out(e.mid(x));
        let moments = match &self.quant {
            Some(conv) => conv.forward(moments),
            None => moments,
        };
        (channels_first(moments).narrow(1, 0, self.latent_channels) - self.shift_factor)
            * self.scaling_factor
    }
}
