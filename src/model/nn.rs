//! The layers that all networks share, with PyTorch's names and shapes. Weights stay in their
//! storage type; every layer computes in f32.

use anyhow::Result;
use burn::tensor::module::{conv2d, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Tensor, activation};

use super::loader::{Loader, QUANTISED_BLOCK};
use crate::lora::{LinearShape, Lora};

/// `torch.nn.Linear`, with a LoRA where one is given for its name.
pub struct Linear {
    /// Its full module name is what LoRA targets select.
    pub shape: LinearShape,
    weight: Weight,
    bias: Option<Tensor<1>>,
}

enum Weight {
    /// [inputs, outputs]: transposed once at load, so that the matrix product reads it in order.
    Float(Tensor<2>),
    /// [outputs, inputs], in blocks along the inputs, the dimension that a product sums over.
    Quantised(Tensor<2>),
}

fn f32<const D: usize>(t: &Tensor<D>) -> Tensor<D> {
    if t.dtype() == DType::F32 { t.clone() } else { t.clone().cast(DType::F32) }
}

impl Linear {
    pub fn load(l: &Loader, part: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let l = l.at(part);
        let shape = [outputs, inputs];
        let scheme = l.storage.scheme().filter(|_| inputs.is_multiple_of(QUANTISED_BLOCK));
        let weight = match scheme {
            Some(scheme) => Weight::Quantised(l.tensor("weight", shape)?.quantize_dynamic(&scheme)),
            None => {
                let weight = l.stored("weight", shape)?;
                let dtype = weight.dtype();
                // A plain transpose is a view; the copy makes it contiguous.
                Weight::Float(Tensor::from_data(weight.transpose().into_data(), (l.device, dtype)))
            }
        };
        let bias = if l.has("bias") { Some(l.tensor("bias", [outputs])?) } else { None };
        let name = l.name("").trim_end_matches('.').to_string();
        Ok(Self { shape: LinearShape { name, inputs, outputs }, weight, bias })
    }

    /// `[.., inputs] -> [.., outputs]`: x W + b, and + s (x A) B where `lora` has this layer.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, lora: Option<&Lora>) -> Tensor<D> {
        let low = lora.and_then(|l| l.get(&self.shape.name)).map(|pair| {
            let down = linear(x.clone(), pair.a.clone(), None);
            linear(down, pair.b.clone(), None) * pair.scale
        });
        let weight = match &self.weight {
            Weight::Float(weight) => f32(weight),
            Weight::Quantised(weight) => weight.clone().dequantize().transpose(),
        };
        let y = linear(x, weight, self.bias.clone());
        match low {
            Some(low) => y + low,
            None => y,
        }
    }
}

/// `torch.nn.Conv2d`.
pub struct Conv2d {
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    pub fn load(
        l: &Loader,
        part: &str,
        cin: usize,
        cout: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let l = l.at(part);
        let weight = l.stored("weight", [cout, cin, kernel, kernel])?;
        let bias = if l.has("bias") { Some(l.tensor("bias", [cout])?) } else { None };
        Ok(Self { weight, bias, stride, padding })
    }

    /// A 3x3 convolution that keeps the size.
    pub fn same(l: &Loader, part: &str, cin: usize, cout: usize) -> Result<Self> {
        Self::load(l, part, cin, cout, 3, 1, 1)
    }

    /// `[B, cin, H, W] -> [B, cout, H', W']`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let options = ConvOptions::new([self.stride; 2], [self.padding; 2], [1, 1], 1);
        conv2d(x, f32(&self.weight), self.bias.clone(), options)
    }
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

    /// `[B, C, H, W]`, normalised over each group of channels.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = x.dims();
        let (g, per) = (self.groups, c / self.groups);
        let x = x.reshape([b, g, per * h * w]);
        let x = x.clone() - x.mean_dim(2);
        let rstd = (x.clone().square().mean_dim(2) + self.eps).sqrt().recip();
        // The group's scale and gamma fold into one factor a channel: one pass over the image
        // instead of two.
        let scale = rstd.expand([b, g, per]).reshape([b, c, 1, 1])
            * self.gamma.clone().reshape([1, c, 1, 1]);
        x.reshape([b, c, h, w]) * scale + self.beta.clone().reshape([1, c, 1, 1])
    }
}

/// `torch.nn.LayerNorm` over the last dimension; without weights where `elementwise_affine` is off.
pub struct LayerNorm {
    eps: f64,
    gamma: Tensor<1>,
    beta: Tensor<1>,
}

impl LayerNorm {
    pub fn load(l: &Loader, part: &str, width: usize, eps: f64) -> Result<Self> {
        let l = l.at(part);
        Ok(Self { eps, gamma: l.tensor("weight", [width])?, beta: l.tensor("bias", [width])? })
    }

    pub fn plain(l: &Loader, width: usize, eps: f64) -> Self {
        Self { eps, gamma: Tensor::ones([width], l.device), beta: Tensor::zeros([width], l.device) }
    }

    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        burn::tensor::module::layer_norm(x, self.gamma.clone(), Some(self.beta.clone()), self.eps)
    }
}

/// `torch.nn.RMSNorm` over the last dimension.
pub struct RmsNorm {
    eps: f64,
    gamma: Tensor<1>,
}

impl RmsNorm {
    pub fn load(l: &Loader, part: &str, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { eps, gamma: l.at(part).tensor("weight", [width])? })
    }

    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let scale = (x.clone().square().mean_dim(D - 1) + self.eps).sqrt().recip();
        x * scale * self.gamma.clone().unsqueeze::<D>()
    }
}

/// Activations by diffusers' and transformers' names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    Silu,
    Gelu,
    /// gelu by tanh: `gelu-approximate` in diffusers, `gelu_new` in transformers.
    GeluTanh,
    QuickGelu,
    Relu,
}

impl Activation {
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Silu => silu(x),
            Self::Gelu => gelu(x),
            Self::GeluTanh => gelu_tanh(x),
            Self::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
            Self::Relu => activation::relu(x),
        }
    }
}

pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::silu(x)
}

/// x Phi(x), by erf. On a GPU Burn 0.22 differentiates its own `gelu` as if it were the tanh
/// approximation, which puts the gradients of everything below off by up to 3e-3; its erf is
/// differentiated exactly.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if on_cpu(&x) {
        activation::gelu(x)
    } else {
        x.clone() * ((x * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5
    }
}

/// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Burn's own takes the cube as a power, which
/// has no derivative at negative numbers on every backend.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let inner = x.clone() * (x.clone().square() * (0.044715 * root) + root);
    x * (inner.tanh() + 1.0) * 0.5
}

/// Whether a tensor is on the CPU backend, whose fused kernels are exact.
pub fn on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    x.device().without_autodiff() == burn::tensor::Device::flex()
}
