//! The layers that all networks share, with PyTorch's names and shapes; images are channels last.
//! Weights stay in their storage type; every layer computes in f32.

use std::sync::Arc;

use anyhow::Result;
use burn::tensor::Tensor;

use super::loader::Loader;
pub use crate::kernels::activation::Activation;
use crate::kernels::activation::activation;
use crate::kernels::frozen_conv::{ConvShape, FrozenConv, frozen_conv};
use crate::kernels::frozen_linear::{LowRank, frozen_linear};
use crate::kernels::frozen_weight::FrozenWeight;
use crate::kernels::group_norm_silu::group_norm_silu;
use crate::kernels::layer_norm::layer_norm;
use crate::kernels::low_rank::low_rank;
use crate::kernels::rms_norm::rms_norm;
use crate::lora::{LayerShape, Lora};

/// `torch.nn.Linear`, with a LoRA where one is given for its name.
pub struct Linear {
    /// Its full module name is what LoRA targets select.
    pub shape: LayerShape,
    weight: Arc<FrozenWeight>,
    bias: Option<Tensor<1>>,
}

impl Linear {
    pub fn load(l: &Loader, part: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let l = l.at(part);
        let weight = Arc::new(l.frozen("weight", [outputs, inputs], l.storage, |input| input)?);
        let bias = if l.has("bias") { Some(l.tensor("bias", [outputs])?) } else { None };
        let name = l.name("").trim_end_matches('.').to_string();
        Ok(Self {
            shape: LayerShape { name, original: None, kernel: None, inputs, outputs },
            weight,
            bias,
        })
    }

    /// `[.., inputs] -> [.., outputs]`: x W + b, and + s (x A) B where `lora` has this layer.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, lora: Option<&Lora>) -> Tensor<D> {
        let low = lora.and_then(|l| l.get(&self.shape.name));
        let low = low.map(|pair| LowRank { a: &pair.a, b: &pair.b, scale: pair.scale });
        frozen_linear(x, &self.weight, self.bias.as_ref(), low)
    }
}

/// `torch.nn.Conv2d`, with a LoRA where one is given for its name.
pub struct Conv2d {
    /// As an adapter sees it.
    pub shape: LayerShape,
    conv: FrozenConv,
}

impl Conv2d {
    /// # Errors
    /// Names the tensor that is missing or of the wrong shape.
    pub fn load(l: &Loader, part: &str, shape: ConvShape) -> Result<Self> {
        let l = l.at(part);
        let ConvShape { cin, cout, kernel, .. } = shape;
        let (stored, own) = ([cout, cin, kernel, kernel], l.storage.unquantised());
        let weight = l.frozen("weight", stored, own, |row| shape.place(row))?;
        let bias = if l.has("bias") { Some(l.tensor("bias", [cout])?) } else { None };
        let conv = FrozenConv::new(weight, shape, bias);
        let name = l.name("").trim_end_matches('.').to_string();
        let inputs = kernel * kernel * cin;
        let kernel = Some(kernel);
        let shape = LayerShape { name, original: None, kernel, inputs, outputs: cout };
        Ok(Self { shape, conv })
    }

    /// A 3x3 convolution that keeps the size.
    pub fn same(l: &Loader, part: &str, cin: usize, cout: usize) -> Result<Self> {
        Self::load(l, part, ConvShape { cin, cout, kernel: 3, stride: 1, padding: 1 })
    }

    /// A 1x1 convolution.
    pub fn point(l: &Loader, part: &str, cin: usize, cout: usize) -> Result<Self> {
        Self::load(l, part, ConvShape { cin, cout, kernel: 1, stride: 1, padding: 0 })
    }

    /// Patches of an image, none of which overlaps another.
    pub fn patches(l: &Loader, part: &str, cin: usize, cout: usize, size: usize) -> Result<Self> {
        Self::load(l, part, ConvShape { cin, cout, kernel: size, stride: size, padding: 0 })
    }

    /// `[B, H, W, cin] -> [B, H', W', cout]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.adapted(x, None)
    }

    /// The same with what an adapter adds.
    pub fn adapted(&self, x: Tensor<4>, lora: Option<&Lora>) -> Tensor<4> {
        let Some(pair) = lora.and_then(|l| l.get(&self.shape.name)) else {
            return frozen_conv(x, &self.conv);
        };
        let low = LowRank { a: &pair.a, b: &pair.b, scale: pair.scale };
        frozen_conv(x.clone(), &self.conv) + low_rank(x, self.conv.shape, low)
    }
}

/// `[B, C, H, W] -> [B, H, W, C]`.
pub fn channels_last(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 2, 3, 1])
}

/// The reverse of [`channels_last`].
pub fn channels_first(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 3, 1, 2])
}

/// `torch.nn.GroupNorm`.
pub struct GroupNorm {
    groups: usize,
    eps: f64,
    gamma: Tensor<1>,
    beta: Tensor<1>,
}

impl GroupNorm {
    pub fn load(l: &Loader, part: &str, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        let l = l.at(part);
        Ok(Self {
            groups,
            eps,
            gamma: l.tensor("weight", [channels])?,
            beta: l.tensor("bias", [channels])?,
        })
    }

    /// `[B, H, W, C]`, normalised over each group of channels.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        group_norm_silu(x, self.groups, &self.gamma, &self.beta, self.eps, false)
    }

    /// The same with an activation after it.
    pub fn activated(&self, x: Tensor<4>, act: Activation) -> Tensor<4> {
        match act {
            Activation::Silu => {
                group_norm_silu(x, self.groups, &self.gamma, &self.beta, self.eps, true)
            }
            other => other.forward(self.forward(x)),
        }
    }
}

/// `torch.nn.LayerNorm` over the last dimension.
pub struct LayerNorm {
    eps: f64,
    /// `[1, width]`
    gamma: Tensor<2>,
    beta: Tensor<2>,
}

impl LayerNorm {
    pub fn load(l: &Loader, part: &str, width: usize, eps: f64) -> Result<Self> {
        let l = l.at(part);
        let vector = |part| Ok::<_, anyhow::Error>(l.tensor(part, [width])?.unsqueeze());
        Ok(Self { eps, gamma: vector("weight")?, beta: vector("bias")? })
    }

    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        layer_norm(x, self.gamma.clone(), self.beta.clone(), self.eps)
    }
}

/// `torch.nn.RMSNorm` over the last dimension.
pub struct RmsNorm {
    eps: f64,
    /// `[1, width]`
    gamma: Tensor<2>,
}

impl RmsNorm {
    pub fn load(l: &Loader, part: &str, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { eps, gamma: l.at(part).tensor::<1>("weight", [width])?.unsqueeze() })
    }

    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let shape = x.dims();
        let width = shape[D - 1];
        let rows = shape.iter().product::<usize>() / width.max(1);
        rms_norm(x.reshape([1, rows, width]), self.gamma.clone(), self.eps).reshape(shape)
    }

    /// `[B, T, width]`, and times a factor of each image, `[B, width]`, that no gradient is asked
    /// of.
    pub fn times(&self, x: Tensor<3>, factor: Tensor<2>) -> Tensor<3> {
        rms_norm(x, self.gamma.clone() * factor, self.eps)
    }
}

/// silu(gate) x: what transformers of today have between the products of a feed-forward.
pub fn silu_gated<const D: usize>(gate: Tensor<D>, x: Tensor<D>) -> Tensor<D> {
    Activation::Silu.forward(gate) * x
}

impl Activation {
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        activation(self, x)
    }
}
