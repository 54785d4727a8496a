//! diffusers' `AutoencoderKL`: decode for the images, encode for checks.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};
use serde_json::json;

use super::attention::Attention;
use super::blocks::{Downsample, Resnet, ResnetSpec, Upsample};
use super::config::Config;
use super::nn::{Conv2d, GroupNorm, silu};
use super::weights::{Loader, Storage, Weights};

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
        let names = if old { ["query", "key", "value", "proj_attn"] } else { ["to_q", "to_k", "to_v", "to_out.0"] };
        Ok(Self {
            norm: GroupNorm::load(l, "group_norm", groups, c, 1e-6)?,
            attention: Attention::load(l, names, c, c, 1)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = x.dims();
        let y = self.norm.forward(x.clone()).reshape([b, c, h * w]).swap_dims(1, 2);
        x + self.attention.forward(y, None, None, None).swap_dims(1, 2).reshape([b, c, h, w])
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

impl Coder {
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
                x = down.forward(x);
            }
            if let Some(up) = &level.up {
                x = up.forward(x, None);
            }
        }
        x
    }

    fn out(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv_out.forward(silu(self.norm_out.forward(x)))
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
    encoder: Coder,
    quant: Option<Conv2d>,
    post_quant: Option<Conv2d>,
    decoder: Coder,
}

impl Vae {
    /// Loads a `vae` folder.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        c.only(&[("latents_mean", json!(null)), ("latents_std", json!(null))])?;
        let n = c.json["down_block_types"].as_array().map_or(1, Vec::len);
        for (field, block) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            for name in c.names(field, &[block])? {
                ensure!(name == block, c.bad(field, &format!("holds {name:?}; only {block} is supported")));
            }
        }
        let channels = match &c.json["block_out_channels"] {
            serde_json::Value::Null => vec![64],
            _ => c.sizes("block_out_channels", n, 0)?,
        };
        let layers = c.size("layers_per_block", 1)?;
        let latent = c.size("latent_channels", 4)?;
        let groups = c.size("norm_num_groups", 32)?;
        for &ch in &channels {
            ensure!(
                groups > 0 && ch % groups == 0,
                c.bad("norm_num_groups", &format!("does not divide {ch} channels"))
            );
        }
        let images = (c.size("in_channels", 3)?, c.size("out_channels", 3)?);
        if images != (3, 3) {
            let field = if images.0 == 3 { "out_channels" } else { "in_channels" };
            bail!(c.bad(field, "is not supported; images have 3 channels"));
        }
        let resnet = ResnetSpec {
            groups,
            eps: 1e-6,
            activation: c.activation("act_fn", "silu")?,
            time: None,
            scale_shift: false,
            output_scale: 1.0,
        };
        let attention = c.flag("mid_block_add_attention", true)?;
        let weights = Weights::open_dir(dir)?;
        let root = Loader::new(&weights, device, storage);
        let coder = |part: &str, input: usize, output: usize, encode: bool| -> Result<Coder> {
            let l = root.at(part);
            let deep = channels[n - 1];
            let (first, last) = if encode { (channels[0], deep) } else { (deep, channels[0]) };
            let mid = |j: usize| Resnet::load(&l.at(format!("mid_block.resnets.{j}")), deep, deep, resnet);
            let levels = (0..n).map(|i| {
                let l = l.at(format!("{}_blocks.{i}", if encode { "down" } else { "up" }));
                let order = |i: usize| if encode { channels[i] } else { channels[n - 1 - i] };
                let (cin, cout) = (order(i.saturating_sub(1)), order(i));
                let resnets = (0..layers + usize::from(!encode))
                    .map(|j| Resnet::load(&l.at(format!("resnets.{j}")), if j == 0 { cin } else { cout }, cout, resnet))
                    .collect::<Result<_>>()?;
                let resize = i + 1 < n;
                let down =
                    if encode && resize { Some(Downsample::load(&l.at("downsamplers.0"), cout, 0)?) } else { None };
                let up = if !encode && resize { Some(Upsample::load(&l.at("upsamplers.0"), cout)?) } else { None };
                Ok(Level { resnets, down, up })
            });
            Ok(Coder {
                conv_in: Conv2d::same(&l, "conv_in", input, first)?,
                mid: [mid(0)?, mid(1)?],
                attention: if attention {
                    Some(MidAttention::load(&l.at("mid_block.attentions.0"), groups, deep)?)
                } else {
                    None
                },
                levels: levels.collect::<Result<_>>()?,
                norm_out: GroupNorm::load(&l, "conv_norm_out", groups, last, 1e-6)?,
                conv_out: Conv2d::same(&l, "conv_out", last, output)?,
            })
        };
        let one = |field: &str, part: &str, c1: usize| -> Result<Option<Conv2d>> {
            Ok(if c.flag(field, true)? { Some(Conv2d::load(&root, part, c1, c1, 1, 1, 0)?) } else { None })
        };
        Ok(Self {
            scaling_factor: c.float("scaling_factor", 0.18215)?,
            shift_factor: c.float("shift_factor", 0.0)?,
            latent_channels: latent,
            factor: 1 << (n - 1),
            encoder: coder("encoder", 3, 2 * latent, true)?,
            quant: one("use_quant_conv", "quant_conv", 2 * latent)?,
            post_quant: one("use_post_quant_conv", "post_quant_conv", latent)?,
            decoder: coder("decoder", latent, 3, false)?,
        })
    }

    /// Latents `[B, C, h, w]` as the sampler has them -> images `[B, 3, H, W]`, not clamped, around [-1, 1].
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let z = latents / self.scaling_factor + self.shift_factor;
        let z = match &self.post_quant {
            Some(conv) => conv.forward(z),
            None => z,
        };
        let d = &self.decoder;
        let x = d.mid(d.conv_in.forward(z));
        d.out(d.levels(x))
    }

    /// Images `[B, 3, H, W]` in [-1, 1] -> the mean of the latent distribution, scaled, `[B, C, h, w]`.
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        let e = &self.encoder;
        let x = e.levels(e.conv_in.forward(images));
        let moments = e.out(e.mid(x));
        let moments = match &self.quant {
            Some(conv) => conv.forward(moments),
            None => moments,
        };
        (moments.narrow(1, 0, self.latent_channels) - self.shift_factor) * self.scaling_factor
    }
}
