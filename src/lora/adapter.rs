//! Low-rank adapters on linear layers: y = x W + s (x A) B, s = alpha / rank (Hu et al. 2021), and
//! on convolutions, whose x are neighbourhoods. f32 always, whatever the frozen weights are stored
//! in. The reference policy is the same network without the adapter: no second copy.

use std::collections::HashMap;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};

use crate::device::tensor::upload;
use crate::philox::{self, Stream};

/// A linear layer or convolution that an adapter can be on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Full module name, as in the weight file.
    pub name: String,
    /// Its name in the layout of the model's authors, where files of adapters have that (SDXL's by
    /// sd-scripts).
    pub original: Option<String>,
    /// Side of its kernel, where it is a convolution.
    pub kernel: Option<usize>,
    /// Of a convolution its channels at all places of the kernel.
    pub inputs: usize,
    pub outputs: usize,
}

/// A layer's matrices on a device.
pub struct Pair {
    /// `[inputs, rank]`
    pub a: Tensor<2>,
    /// `[rank, outputs]`
    pub b: Tensor<2>,
    /// alpha / rank
    pub scale: f64,
}

/// An adapter on a device, by layer name.
pub struct Lora {
    pairs: HashMap<String, Pair>,
}

impl Lora {
    pub fn get(&self, name: &str) -> Option<&Pair> {
        self.pairs.get(name)
    }

    /// The same values as leaves that collect gradients; nothing is uploaded again.
    pub fn tracked(&self) -> Self {
        let track = |t: &Tensor<2>| t.clone().autodiff().require_grad();
        let pair = |pair: &Pair| Pair { a: track(&pair.a), b: track(&pair.b), scale: pair.scale };
        Self { pairs: self.pairs.iter().map(|(name, p)| (name.clone(), pair(p))).collect() }
    }
}

/// One adapted layer on the host, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    pub name: String,
    /// See [`LayerShape::original`].
    pub original: Option<String>,
    /// See [`LayerShape::kernel`].
    pub kernel: Option<usize>,
    pub inputs: usize,
    pub outputs: usize,
    /// `[inputs, rank]`; of a convolution place by place, and channel by channel in it.
    pub a: Vec<f32>,
    /// `[rank, outputs]`
    pub b: Vec<f32>,
}

/// An adapter on the host: what is trained, saved and loaded. A few megabytes; it goes to the
/// device once an update.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub rank: usize,
    pub alpha: f64,
    pub layers: Vec<Layer>,
}

/// Whether a module name ends in one of the targets, as peft matches them: `to_q` or `attn1.to_q`.
pub fn targeted(name: &str, targets: &[String]) -> bool {
    targets.iter().any(|t| name == t || name.ends_with(&format!(".{t}")))
}

/// Checks that each target is among the layers of a network's blocks.
///
/// # Errors
/// Names the target that is not.
pub fn check_targets(targets: &[String], layers: &[&str]) -> Result<()> {
    for target in targets {
        ensure!(
            layers.iter().any(|name| targeted(name, std::slice::from_ref(target))),
            "--target-modules {target}: the network's blocks have no layer of that name; to_q, \
             to_k, to_v, to_out.0 are there, and in a UNet conv1, conv2, conv_shortcut, conv"
        );
    }
    Ok(())
}

impl Adapter {
    /// A fresh adapter on the targeted layers: A gaussian with deviation 1 / rank (peft's
    /// "gaussian"), B zero.
    ///
    /// # Errors
    /// When a target matches no linear layer, or rank is 0.
    pub fn new(
        linears: &[LayerShape],
        targets: &[String],
        rank: usize,
        alpha: f64,
        seed: u64,
    ) -> Result<Self> {
        ensure!(rank > 0, "--rank 0: must be at least 1");
        ensure!(alpha > 0.0, "--alpha {alpha}: must be positive");
        let names: Vec<&str> = linears.iter().map(|l| l.name.as_str()).collect();
        check_targets(targets, &names)?;
        let chosen = linears.iter().filter(|l| targeted(&l.name, targets));
        let layers = chosen.enumerate().map(|(i, l)| {
            let mut a = philox::noise(seed, Stream::LoraInit, i as u32, 0, l.inputs * rank);
            a.iter_mut().for_each(|v| *v /= rank as f32);
            let b = vec![0.0; rank * l.outputs];
            Layer {
                name: l.name.clone(),
                original: l.original.clone(),
                kernel: l.kernel,
                inputs: l.inputs,
                outputs: l.outputs,
                a,
                b,
            }
        });
        Ok(Self { rank, alpha, layers: layers.collect() })
    }

    /// Checks that every layer exists in the network with the same widths.
    ///
    /// # Errors
    /// Names the first layer that does not fit.
    pub fn fits(&self, linears: &[LayerShape]) -> Result<()> {
        for layer in &self.layers {
            let Some(found) = linears.iter().find(|l| l.name == layer.name) else {
                bail!(
                    "the adapter's layer {} is not in this network; it belongs to another model",
                    layer.name
                )
            };
            ensure!(
                (found.inputs, found.outputs) == (layer.inputs, layer.outputs),
                "the adapter's layer {} is {}x{}, the network's {}x{}; it belongs to another model",
                layer.name,
                layer.inputs,
                layer.outputs,
                found.inputs,
                found.outputs
            );
        }
        Ok(())
    }

    /// The adapter on a device, without gradients; see [`Lora::tracked`].
    pub fn to_device(&self, device: &Device) -> Lora {
        let scale = self.alpha / self.rank as f64;
        let pair = |l: &Layer| Pair {
            a: upload(&l.a, [l.inputs, self.rank], device),
            b: upload(&l.b, [self.rank, l.outputs], device),
            scale,
        };
        Lora { pairs: self.layers.iter().map(|l| (l.name.clone(), pair(l))).collect() }
    }

    /// All matrices as flat parameters, A then B of each layer.
    pub fn parameters(&self) -> impl Iterator<Item = &Vec<f32>> + Clone {
        self.layers.iter().flat_map(|l| [&l.a, &l.b])
    }

    /// [`Self::parameters`], to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.layers.iter_mut().flat_map(|l| [&mut l.a, &mut l.b])
    }

    /// Moves to another adapter of the same layers, of which `1 - decay` is taken.
    pub fn approach(&mut self, other: &Self, decay: f64) {
        for (own, new) in self.parameters_mut().zip(other.parameters()) {
            for (own, new) in own.iter_mut().zip(new) {
                *own = (decay * f64::from(*own) + (1.0 - decay) * f64::from(*new)) as f32;
            }
        }
    }

    /// Whether all values are finite.
    pub fn is_finite(&self) -> bool {
        self.parameters().flatten().all(|v| v.is_finite())
    }

    /// Number of trained values.
    pub fn len(&self) -> usize {
        self.layers.iter().map(|l| l.a.len() + l.b.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }
}
