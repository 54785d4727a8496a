//! Timing the kernels of networks: each as shader, on the CPU, and as Burn tensor operations on the
//! same device, forward and with its gradient; values are compared before anything is timed.
//! `pcpo-wgpu bench` and `cargo bench` share it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};

use super::errors::relative_error;
use super::timing::{Selection, force, medians, row};
use crate::device::Compute;
use crate::device::tensor::{read, upload};
use crate::kernels::activation::{Activation, activation};
use crate::kernels::attention::{Heads, attention};
use crate::kernels::frozen_conv::{ConvShape, FrozenConv, frozen_conv};
use crate::kernels::frozen_linear::frozen_linear;
use crate::kernels::frozen_weight::{FrozenWeight, Storage};
use crate::kernels::geglu::geglu;
use crate::kernels::group_norm_silu::group_norm_silu;
use crate::kernels::layer_norm::layer_norm;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::tensor_ops;
use crate::model::nn::{channels_first, channels_last};
use crate::philox::{Stream, noise};

/// The sides of images, with their channels, and the tokens of attentions with heads and width of a
/// head: what kernels are timed at.
#[derive(Clone, Copy)]
pub struct KernelSizes {
    pub images: &'static [[usize; 2]],
    pub attentions: &'static [[usize; 3]],
}

/// Those of small networks.
pub const SMALL: KernelSizes = KernelSizes { images: &[[16, 64]], attentions: &[[256, 4, 16]] };
/// Those of Stable Diffusion 1.5's UNet at 512 pixels.
pub const STABLE_DIFFUSION: KernelSizes = KernelSizes {
    images: &[[64, 320], [32, 640], [16, 1280], [8, 1280]],
    attentions: &[[4096, 8, 40], [1024, 8, 80], [256, 8, 160]],
};

/// The names of the rows; a kernel's gradient goes with it.
pub const NAMES: [&str; 8] = [
    "frozen_conv",
    "group_norm_silu",
    "frozen_linear",
    "layer_norm",
    "rms_norm",
    "geglu",
    "activation",
    "attention",
];

/// A table that is being made.
struct Table<'a> {
    compute: &'a Compute,
    only: &'a Selection,
    line: &'a mut dyn FnMut(String),
}

/// A function of tensors with what it holds on a device.
type Function<const N: usize, const D: usize> = Box<dyn Fn([Tensor<D>; N]) -> Tensor<D>>;

/// A kernel and what Burn would run in its place.
struct Case<'a, const N: usize, const D: usize> {
    name: &'a str,
    size: String,
    shapes: [[usize; D]; N],
    kernel: &'a dyn Fn(&Device) -> Function<N, D>,
    burn: &'a dyn Fn(&Device) -> Function<N, D>,
    /// From the kernel's layout to Burn's, and back.
    to_burn: fn(Tensor<D>) -> Tensor<D>,
    from_burn: fn(Tensor<D>) -> Tensor<D>,
}

fn draw<const D: usize>(i: u32, shape: [usize; D], device: &Device) -> Tensor<D> {
    upload(&values(i, shape.iter().product()), shape, device)
}

fn values(i: u32, n: usize) -> Vec<f32> {
    noise(3, Stream::Evaluation, i, 0, n)
}

/// A function on a device with its inputs and the gradient of its output.
struct Path<const N: usize, const D: usize> {
    inputs: [Tensor<D>; N],
    gradient: Tensor<D>,
    run: Function<N, D>,
}

impl<const N: usize, const D: usize> Path<N, D> {
    /// What is in `layout` in the order of the values.
    fn new(
        shapes: [[usize; D]; N],
        device: &Device,
        run: Function<N, D>,
        layout: fn(Tensor<D>) -> Tensor<D>,
    ) -> Result<Self> {
        let given = |i: usize, shape: [usize; D]| {
            let given = layout(draw(i as u32, shape, device));
            anyhow::Ok(upload(&read(&given)?, given.dims(), device))
        };
        let mut inputs = Vec::new();
        for (i, shape) in shapes.into_iter().enumerate() {
            inputs.push(given(i, shape)?);
        }
        let inputs = inputs.try_into().expect("one for each shape");
        let out = run(Clone::clone(&inputs)).dims();
        Ok(Self { inputs, gradient: draw(99, out, device), run })
    }

    fn value(&self) -> Tensor<D> {
        (self.run)(self.inputs.clone())
    }

    /// The gradients of the inputs.
    fn gradients(&self, g: &Tensor<D>) -> Vec<Tensor<D>> {
        let leaves = self.inputs.clone().map(|x| x.autodiff().require_grad());
        let loss = ((self.run)(leaves.clone()) * g.clone().autodiff()).sum();
        let mut grads = loss.backward();
        let all = leaves.iter().map(|leaf| leaf.grad_remove(&mut grads));
        all.map(|g| g.expect("a leaf has a gradient")).collect()
    }

    /// Computes the value, or the gradients, and waits for them.
    fn force(&self, compute: &Compute, gradients: bool) -> Result<()> {
        let made = if gradients { self.gradients(&self.gradient) } else { vec![self.value()] };
        made.iter().for_each(|tensor| force(compute, tensor));
        compute.sync()
    }
}

/// Two lines of a table, where it has the kernel: its value, and its gradient with the value before
/// it.
fn lines<const N: usize, const D: usize>(table: &mut Table, case: &Case<N, D>) -> Result<()> {
    let (Case { name, size, shapes, .. }, compute) = (case, table.compute);
    if !table.only.takes(name) {
        return Ok(());
    }
    // f16 keeps 11 bits of what products take.
    let half = compute.gpu.as_ref().is_some_and(|gpu| gpu.kernels.half);
    let bound = if half { 5e-3 } else { 1e-4 };
    let (device, cpu) = (&compute.burn, &Compute::cpu());
    let kernel = Path::new(*shapes, device, (case.kernel)(device), |x| x)?;
    let burn = Path::new(*shapes, device, (case.burn)(device), case.to_burn)?;
    let reference = Path::new(*shapes, &cpu.burn, (case.kernel)(&cpu.burn), |x| x)?;
    let g = (case.to_burn)(kernel.gradient.clone());
    let of_burn = [burn.value()].into_iter().chain(burn.gradients(&g)).map(case.from_burn);
    let all = |path: &Path<N, D>| {
        [path.value()].into_iter().chain(path.gradients(&path.gradient)).collect::<Vec<_>>()
    };
    for ((ours, burn), reference) in all(&kernel).iter().zip(of_burn).zip(all(&reference)) {
        let expected = read(&reference)?;
        let paths = [("shader", read(ours)?, bound), ("Burn", read(&burn)?, 1e-4)];
        for (path, found, bound) in paths {
            let off = relative_error(&found, &expected);
            ensure!(off < bound, "{name} at {size}: the {path} path is off by {off:e}");
        }
    }
    for (name, gradients) in [(name.to_string(), false), (format!("{name}_gradient"), true)] {
        let [shader, plain] = medians([&mut || kernel.force(compute, gradients), &mut || {
            burn.force(compute, gradients)
        }])?;
        let [reference] = medians([&mut || reference.force(cpu, gradients)])?;
        (table.line)(row(&name, size, [shader, reference, plain]));
    }
    Ok(())
}

/// A table's lines for kernels at some sizes, as they are measured.
///
/// # Errors
/// When paths disagree or the device fails.
pub fn kernel_lines(
    compute: &Compute,
    sizes: KernelSizes,
    only: &Selection,
    mut line: impl FnMut(String),
) -> Result<()> {
    let table = &mut Table { compute, only, line: &mut line };
    for &[side, c] in sizes.images {
        image_kernels(table, side, c)?;
        token_kernels(table, side * side, c)?;
    }
    for &size in sizes.attentions {
        attentions(table, size)?;
    }
    Ok(())
}

/// frozen_conv and group_norm_silu.
fn image_kernels(table: &mut Table, side: usize, c: usize) -> Result<()> {
    let s = ConvShape { cin: c, cout: c, kernel: 3, stride: 1, padding: 1 };
    let scale = 1.0 / ((9 * c) as f32).sqrt();
    let weight: Arc<Vec<f32>> = Arc::new(values(7, 9 * c * c).iter().map(|v| v * scale).collect());
    let (w, plain) = (weight.clone(), weight);
    let case = Case {
        name: "frozen_conv",
        size: format!("{side}x{side}x{c}"),
        shapes: [[1, side, side, c]],
        kernel: &|device| {
            let conv = FrozenConv::of(&w, s, Some(draw(8, [c], device)), Storage::F32, device);
            Box::new(move |[x]| frozen_conv(x, &conv))
        },
        burn: &|device| {
            let (w, b) = (upload(&plain, [c, c, 3, 3], device), draw(8, [c], device));
            Box::new(move |[x]| tensor_ops::conv(x.clone(), constant(&w, &x), constant(&b, &x), s))
        },
        to_burn: channels_first,
        from_burn: channels_last,
    };
    lines(table, &case)?;
    let affine = |device: &Device| [draw(7, [c], device), draw(8, [c], device)];
    let groups = 32.min(c / 2);
    let case = Case {
        name: "group_norm_silu",
        kernel: &|device| {
            let [gamma, beta] = affine(device);
            Box::new(move |[x]| group_norm_silu(x, groups, &gamma, &beta, 1e-5, true))
        },
        burn: &|device| {
            let [gamma, beta] = affine(device);
            Box::new(move |[x]| {
                let [gamma, beta] = [&gamma, &beta].map(|v| constant(v, &x));
                tensor_ops::group_norm_silu(x, groups, gamma, beta, 1e-5, true)
            })
        },
        ..case
    };
    lines(table, &case)
}

/// A constant of a function whose input may collect gradients.
fn constant<const D: usize, const E: usize>(value: &Tensor<D>, input: &Tensor<E>) -> Tensor<D> {
    if input.device().is_autodiff() { value.clone().autodiff() } else { value.clone() }
}

/// frozen_linear, layer_norm, rms_norm, geglu and activation.
fn token_kernels(table: &mut Table, tokens: usize, c: usize) -> Result<()> {
    let outputs = 8 * c;
    let size = format!("{tokens}x{c}");
    let scale = 1.0 / (c as f32).sqrt();
    let weight: Arc<Vec<f32>> =
        Arc::new(values(7, c * outputs).iter().map(|v| v * scale).collect());
    let case = |name| Case::<1, 3> {
        name,
        size: size.clone(),
        shapes: [[1, tokens, c]],
        kernel: &|_| Box::new(|[x]| x),
        burn: &|_| Box::new(|[x]| x),
        to_burn: |x| x,
        from_burn: |x| x,
    };
    let linear = Case {
        size: format!("{tokens}x{c}x{outputs}"),
        kernel: &|device| {
            let values = weight.to_vec();
            let weight = FrozenWeight::new(values, [c, outputs], Storage::F32, device);
            let (weight, bias) = (Arc::new(weight), draw(8, [outputs], device));
            Box::new(move |[x]| frozen_linear(x, &weight, Some(&bias), None))
        },
        burn: &|device| {
            let weight = upload(&weight, [c, outputs], device);
            let bias = draw(8, [outputs], device);
            Box::new(move |[x]| {
                let (weight, bias) = (constant(&weight, &x), constant(&bias, &x));
                tensor_ops::linear(x, weight, bias)
            })
        },
        ..case("frozen_linear")
    };
    lines(table, &linear)?;
    let affine = |device: &Device| [draw(7, [1, c], device), draw(8, [1, c], device)];
    let norm = Case {
        kernel: &|device| {
            let [gamma, beta] = affine(device);
            Box::new(move |[x]| layer_norm(x, gamma.clone(), beta.clone(), 1e-5))
        },
        burn: &|device| {
            let [gamma, beta] = affine(device);
            Box::new(move |[x]| {
                let [gamma, beta] = [&gamma, &beta].map(|v| constant(v, &x));
                tensor_ops::layer_norm(x, gamma, beta, 1e-5)
            })
        },
        ..case("layer_norm")
    };
    lines(table, &norm)?;
    let root = Case {
        kernel: &|device| {
            let [gamma, _] = affine(device);
            Box::new(move |[x]| rms_norm(x, gamma.clone(), 1e-5))
        },
        burn: &|device| {
            let [gamma, _] = affine(device);
            Box::new(move |[x]| {
                let gamma = constant(&gamma, &x);
                tensor_ops::rms_norm(x, gamma, 1e-5)
            })
        },
        ..case("rms_norm")
    };
    lines(table, &root)?;
    let gated = Case {
        size: format!("{tokens}x{outputs}"),
        shapes: [[1, tokens, outputs]],
        kernel: &|_| Box::new(|[h]| geglu(h)),
        burn: &|_| Box::new(|[h]| tensor_ops::geglu(h)),
        ..case("geglu")
    };
    lines(table, &gated)?;
    let silu = Case {
        kernel: &|_| Box::new(|[x]| activation(Activation::Silu, x)),
        burn: &|_| Box::new(|[x]| tensor_ops::activation(Activation::Silu, x)),
        ..case("activation")
    };
    lines(table, &silu)
}

fn attentions(table: &mut Table, [mut tokens, heads, head]: [usize; 3]) -> Result<()> {
    // Burn's scores are one tensor, which a device may not bind: software Vulkan, from 2049 tokens
    // of eight heads on.
    let bound = table.compute.gpu.as_ref().map_or(u64::MAX, |gpu| gpu.most_bound);
    while (4 * heads * tokens * tokens) as u64 > bound {
        tokens /= 2;
    }
    let width = heads * head;
    let how = Heads::of(heads, width);
    let case = Case {
        name: "attention",
        size: format!("{tokens}x{heads}x{head}"),
        shapes: [[1, tokens, width]; 3],
        kernel: &|_| Box::new(move |[q, k, v]| attention(q, k, v, None, how)),
        burn: &|_| Box::new(move |[q, k, v]| tensor_ops::attention(q, k, v, None, how)),
        to_burn: |x| x,
        from_burn: |x| x,
    };
    lines(table, &case)
}
