//! diffusers' `AutoencoderKL` and `AutoencoderKLFlux2`: decode for the images, encode for checks.

pub mod config;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};

use self::config::{PATCH, VaeConfig};
use super::attention::Attention;
use super::blocks::{Downsample, Resnet, Upsample};
use super::component::Component;
use super::loader::{Loader, Storage};
use super::nn::{Activation, Conv2d, GroupNorm, channels_first, channels_last};
use super::tiles::tiled;

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
            Way::Decode => c.decoder_channels[n - 1 - i],
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
        let channels = match way {
            Way::Encode => &c.channels,
            Way::Decode => &c.decoder_channels,
        };
        let n = channels.len();
        let (shallow, deep) = (channels[0], channels[n - 1]);
        let (part, input, output, first, last) = match way {
            Way::Encode => ("encoder", 3, 2 * c.coded_channels, shallow, deep),
            Way::Decode => ("decoder", c.coded_channels, 3, deep, shallow),
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

/// How FLUX.2's latents are what its decoder takes: squares of pixels packed into channels (c, row,
/// column) and normalised by what a batch norm has counted.
struct Packed {
    /// `[1, C, 1, 1]`
    mean: Tensor<4>,
    deviation: Tensor<4>,
}

impl Packed {
    fn load(root: &Loader, channels: usize, eps: f64) -> Result<Self> {
        let l = root.at("bn");
        let counted = |part: &str| {
            l.tensor::<1>(part, [channels]).map(|values| values.reshape([1, channels, 1, 1]))
        };
        let variance = counted("running_var")?;
        let least = l.values("running_var", [channels])?.into_iter().fold(f32::INFINITY, f32::min);
        ensure!(
            least >= 0.0,
            "{}: tensor {} holds {least}; a variance is not negative",
            root.weights.source().display(),
            l.name("running_var")
        );
        Ok(Self { mean: counted("running_mean")?, deviation: (variance + eps).sqrt() })
    }

    fn unpack(&self, latents: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = latents.dims();
        let coded = latents * self.deviation.clone() + self.mean.clone();
        let (c, p) = (c / (PATCH * PATCH), PATCH);
        coded.reshape([b, c, p, p, h, w]).permute([0, 1, 4, 2, 5, 3]).reshape([b, c, p * h, p * w])
    }

    fn pack(&self, coded: Tensor<4>) -> Tensor<4> {
        let ([b, c, h, w], p) = (coded.dims(), PATCH);
        let (h, w) = (h / p, w / p);
        let packed = coded.reshape([b, c, h, p, w, p]).permute([0, 1, 3, 5, 2, 4]);
        (packed.reshape([b, c * p * p, h, w]) - self.mean.clone()) / self.deviation.clone()
    }
}

/// The image autoencoder.
pub struct Vae {
    /// Latents are divided by this before decoding, and shifted by that.
    pub scaling_factor: f64,
    pub shift_factor: f64,
    pub latent_channels: usize,
    /// Channels of what its decoder takes: others than the latents' where these are packed.
    pub coded_channels: usize,
    /// Image pixels a latent pixel, along each side.
    pub factor: usize,
    packed: Option<Packed>,
    /// Side in latent pixels of the tiles that it decodes one by one, where it does.
    pub tile: Option<usize>,
    /// What that is where it does.
    pub tile_side: usize,
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
        let latent = c.coded_channels;
        let packed = c.packed.map(|eps| Packed::load(&root, c.latent_channels(), eps));
        let one = |wanted: bool, part: &str, width: usize| {
            let conv = wanted.then(|| Conv2d::point(&root, part, width, width));
            conv.transpose()
        };
        Ok(Self {
            scaling_factor: c.scaling_factor,
            shift_factor: c.shift_factor,
            latent_channels: c.latent_channels(),
            coded_channels: latent,
            factor: c.factor(),
            packed: packed.transpose()?,
            encoder: Coder::load(&root, &c, Way::Encode)?,
            quant: one(c.quant, "quant_conv", 2 * latent)?,
            post_quant: one(c.post_quant, "post_quant_conv", latent)?,
            decoder: Coder::load(&root, &c, Way::Decode)?,
            tile: None,
            tile_side: c.tile(),
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
        self.decode_coded(match &self.packed {
            Some(packed) => packed.unpack(latents),
            None => latents / self.scaling_factor + self.shift_factor,
        })
    }

    /// What the decoder takes, `[B, C, h, w]` -> images, as [`Self::decode`].
    pub fn decode_coded(&self, coded: Tensor<4>) -> Tensor<4> {
        let z = channels_last(coded);
        let z = match &self.post_quant {
            Some(conv) => conv.forward(z),
            None => z,
        };
        let d = &self.decoder;
        let x = d.mid(d.conv_in.forward(z));
        channels_first(d.out(d.levels(x)))
    }

    /// Images `[B, 3, H, W]` in [-1, 1] -> the mean of the latent distribution as the sampler has
    /// latents, `[B, C, h, w]`.
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        let coded = self.encode_coded(images);
        match &self.packed {
            Some(packed) => packed.pack(coded),
            None => (coded - self.shift_factor) * self.scaling_factor,
        }
    }

    /// The same as the encoder gives it.
    pub fn encode_coded(&self, images: Tensor<4>) -> Tensor<4> {
        let e = &self.encoder;
        let x = e.levels(e.conv_in.forward(channels_last(images)));
        let moments = e.out(e.mid(x));
        let moments = match &self.quant {
            Some(conv) => conv.forward(moments),
            None => moments,
        };
        channels_first(moments).narrow(1, 0, self.coded_channels)
    }
}
