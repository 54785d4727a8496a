//! The kernels of networks, on the CPU and as shaders: value and gradient against Burn's own
//! operations, and a row's result whatever stands beside it. One test a kernel, by the kernels'
//! names: activation with activation_gradient, geglu with geglu_gradient, layer_norm with
//! layer_norm_gradient, rms_norm with rms_norm_gradient, group_norm_silu with
//! group_norm_silu_gradient, frozen_conv with frozen_conv_gradient, frozen_linear with
//! frozen_linear_gradient, attention with attention_delta, attention_gradient_q and
//! attention_gradient_kv. Adapters beside them are in low_rank.rs.

use std::sync::OnceLock;

use burn::tensor::{Device, Tensor};
use pcpo_wgpu::device::adapters::Opening;
use pcpo_wgpu::device::tensor::{read, upload};
use pcpo_wgpu::device::{Compute, ComputeType};
use pcpo_wgpu::kernels::activation::{Activation, activation};
use pcpo_wgpu::kernels::attention::{Heads, attention};
use pcpo_wgpu::kernels::frozen_conv::{ConvShape, FrozenConv, frozen_conv};
use pcpo_wgpu::kernels::frozen_linear::frozen_linear;
use pcpo_wgpu::kernels::frozen_weight::{FrozenWeight, Storage};
use pcpo_wgpu::kernels::geglu::geglu;
use pcpo_wgpu::kernels::group_norm_silu::group_norm_silu;
use pcpo_wgpu::kernels::layer_norm::layer_norm;
use pcpo_wgpu::kernels::rms_norm::rms_norm;
use pcpo_wgpu::kernels::tensor_ops;
use pcpo_wgpu::model::nn::{channels_first, channels_last};
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::tools::errors::relative_error;

use crate::support::{cpu, gpu, gpu_with};

fn draw(i: u32, n: usize) -> Vec<f32> {
    noise(5, Stream::Evaluation, i, 0, n)
}

pub fn tensor<const D: usize>(i: u32, shape: [usize; D], device: &Device) -> Tensor<D> {
    upload(&draw(i, shape.iter().product()), shape, device)
}

/// The CPU, the GPU, and the GPU with the kernels of hardware, opened once.
pub fn devices() -> [Device; 3] {
    static TILES: OnceLock<Compute> = OnceLock::new();
    let open = || gpu_with(Opening { by_tiles: true, ..Opening::default() });
    [cpu().burn, gpu().burn, TILES.get_or_init(open).burn.clone()]
}

/// A function's value, and the gradients of its inputs for an output gradient of noise.
fn run<const N: usize, const D: usize, const E: usize>(
    inputs: &[Tensor<D>; N],
    f: impl Fn([Tensor<D>; N]) -> Tensor<E>,
) -> Vec<Vec<f32>> {
    let leaves = inputs.clone().map(|x| x.autodiff().require_grad());
    let y = f(leaves.clone());
    let g = tensor(99, y.dims(), &inputs[0].device());
    let mut grads = (y.clone() * g.autodiff()).sum().backward();
    let gradients = leaves.iter().map(|x| read(&x.grad_remove(&mut grads).unwrap()).unwrap());
    [read(&y.inner()).unwrap()].into_iter().chain(gradients).collect()
}

/// Holds a kernel on both devices to Burn's operations on the CPU, value and gradients.
pub fn agree<const N: usize, const D: usize, const E: usize>(
    what: &str,
    shapes: [[usize; D]; N],
    bound: f64,
    kernel: impl Fn([Tensor<D>; N]) -> Tensor<E>,
    plain: impl Fn([Tensor<D>; N]) -> Tensor<E>,
) {
    let inputs = |device: &Device| {
        let mut i = 0;
        shapes.map(|shape| {
            i += 1;
            tensor(i, shape, device)
        })
    };
    let expected = run(&inputs(&cpu().burn), plain);
    for device in devices() {
        let found = run(&inputs(&device), &kernel);
        for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let off = relative_error(found, expected);
            assert!(off < bound, "{what}, part {part} on {device:?}: off by {off:e}");
        }
        // Without gradients it is the same function.
        let y = read(&kernel(inputs(&device))).unwrap();
        assert_eq!(y, found[0], "{what} on {device:?}: the gradient changes the value");
    }
}

/// Holds the results of the last row to be the same bits whether it is alone or not.
fn rows_do_not_matter<const N: usize, const D: usize, const E: usize>(
    what: &str,
    shapes: [[usize; D]; N],
    kernel: impl Fn([Tensor<D>; N]) -> Tensor<E>,
) {
    for device in devices() {
        let mut i = 0;
        let all = shapes.map(|shape| {
            i += 1;
            tensor::<D>(i, shape, &device)
        });
        let last = all.clone().map(|x| {
            let n = x.dims()[0];
            x.narrow(0, n - 1, 1)
        });
        let (whole, alone) = (run(&all, &kernel), run(&last, &kernel));
        // The value alone: the noise of the output's gradient is another for another shape.
        let end = &whole[0][whole[0].len() - alone[0].len()..];
        assert_eq!(end, &alone[0][..], "{what} on {device:?}");
    }
}

#[test]
fn activation_is_its_formula() {
    use Activation::*;
    for shape in [[3, 7], [64, 130], [1, 3]] {
        for kind in [Silu, Gelu, GeluTanh, QuickGelu, Relu] {
            let plain = move |[x]: [Tensor<2>; 1]| tensor_ops::activation(kind, x);
            agree(&format!("{kind:?}"), [shape], 5e-6, |[x]| activation(kind, x), plain);
        }
    }
}

#[test]
fn nothing_overflows_and_nan_stays() {
    use Activation::*;
    let values = [-3e38, -1e4, -90.0, 90.0, 1e4, f32::NAN];
    for device in devices() {
        for kind in [Silu, Gelu, GeluTanh, QuickGelu, Relu] {
            let x: Tensor<1> = upload(&values, [6], &device);
            let y = read(&activation(kind, x)).unwrap();
            assert!(y[..5].iter().all(|v| v.is_finite()), "{kind:?} on {device:?}: {y:?}");
            assert!(y[..3].iter().all(|v| v.abs() < 1e-3), "{kind:?} on {device:?}: {y:?}");
            assert_eq!(y[3..5], values[3..5], "{kind:?} on {device:?}");
            assert!(y[5].is_nan() || !cpu_is(&device), "{kind:?} on {device:?}");
        }
    }
}

/// Shaders may assume that there is no NaN (WGSL 15.7.2); what diverges is found on the host.
fn cpu_is(device: &Device) -> bool {
    *device == Device::flex()
}

#[test]
fn geglu_is_its_formula() {
    for [b, t, inner] in [[2, 3, 5], [3, 16, 64], [1, 1, 6]] {
        let plain = |[h]: [Tensor<3>; 1]| tensor_ops::geglu(h);
        agree("geglu", [[b, t, 2 * inner]], 2e-6, |[h]| geglu(h), plain);
        rows_do_not_matter("geglu", [[b, t, 2 * inner]], |[h]| geglu(h));
    }
}

#[test]
fn layer_norm_and_rms_norm_are_those_of_burn_and_modulate() {
    for [b, t, w] in [[2, 3, 5], [3, 7, 66], [2, 16, 320]] {
        for rows in [1, b] {
            let affine =
                |device: &Device| [tensor(7, [rows, w], device), tensor(8, [rows, w], device)];
            let kernel = |[x]: [Tensor<3>; 1]| {
                let [gamma, beta] = affine(&x.device().without_autodiff());
                layer_norm(x, gamma, beta, 1e-5)
            };
            let plain = |[x]: [Tensor<3>; 1]| {
                let [gamma, beta] = affine(&cpu().burn).map(Tensor::autodiff);
                tensor_ops::layer_norm(x, gamma, beta, 1e-5)
            };
            agree(&format!("{b}x{t}x{w}, {rows}"), [[b, t, w]], 5e-6, kernel, plain);
            let root = |[x]: [Tensor<3>; 1]| {
                rms_norm(x.clone(), affine(&x.device().without_autodiff())[0].clone(), 1e-5)
            };
            let plain = |[x]: [Tensor<3>; 1]| {
                tensor_ops::rms_norm(x, affine(&cpu().burn)[0].clone().autodiff(), 1e-5)
            };
            agree(&format!("rms {b}x{t}x{w}, {rows}"), [[b, t, w]], 5e-6, root, plain);
            if rows == 1 {
                rows_do_not_matter("layer_norm", [[b, t, w]], kernel);
                rows_do_not_matter("rms_norm", [[b, t, w]], root);
            }
        }
    }
}

#[test]
fn group_norm_silu_is_its_formula() {
    for ([b, h, w, c], groups) in [([2, 3, 5, 6], 3), ([3, 8, 8, 32], 8), ([1, 4, 4, 30], 3)] {
        for silu in [false, true] {
            let kernel = |[x]: [Tensor<4>; 1]| {
                let device = x.device().without_autodiff();
                let (gamma, beta) = (tensor(7, [c], &device), tensor(8, [c], &device));
                // A mean far from zero, which a sum of squares would not survive.
                group_norm_silu(x + 5.0, groups, &gamma, &beta, 1e-5, silu)
            };
            let plain = |[x]: [Tensor<4>; 1]| {
                let affine = |i| tensor(i, [c], &cpu().burn).autodiff();
                let x = channels_first(x + 5.0);
                channels_last(tensor_ops::group_norm_silu(
                    x,
                    groups,
                    affine(7),
                    affine(8),
                    1e-5,
                    silu,
                ))
            };
            // Adding 5 rounds the values themselves.
            agree(&format!("{c} channels, silu {silu}"), [[b, h, w, c]], 2e-5, kernel, plain);
            rows_do_not_matter("group_norm_silu", [[b, h, w, c]], kernel);
        }
    }
}

#[test]
fn frozen_conv_is_that_of_burn() {
    let shape =
        |cin, cout, kernel, stride, padding| ConvShape { cin, cout, kernel, stride, padding };
    for (s, [b, h, w], storage) in [
        (shape(3, 5, 3, 1, 1), [2, 7, 6], Storage::F32),
        (shape(64, 66, 3, 1, 1), [2, 8, 8], Storage::F32),
        (shape(8, 16, 3, 2, 1), [3, 8, 6], Storage::F32),
        (shape(8, 4, 3, 2, 0), [1, 9, 9], Storage::F32),
        (shape(6, 10, 1, 1, 0), [2, 5, 5], Storage::F32),
        (shape(3, 12, 4, 4, 0), [2, 8, 8], Storage::F32),
        (shape(5, 3, 3, 1, 1), [2, 4, 4], Storage::F16),
        // Large enough to be taken place by place.
        (shape(384, 320, 3, 1, 1), [2, 4, 4], Storage::F16),
        (shape(384, 320, 3, 2, 1), [1, 4, 6], Storage::F16),
    ] {
        let n = s.cout * s.cin * s.kernel * s.kernel;
        // Values that f16 holds, so that both sides have the same.
        let scale = 1.0 / (s.cin * s.kernel * s.kernel) as f32;
        let round = |v: f32| half::f16::from_f32(v * scale.sqrt()).to_f32();
        let values: Vec<f32> = draw(3, n).into_iter().map(round).collect();
        let kernel = |[x]: [Tensor<4>; 1]| {
            let device = x.device().without_autodiff();
            let bias = Some(tensor(4, [s.cout], &device));
            frozen_conv(x, &FrozenConv::of(&values, s, bias, storage, &device))
        };
        let plain = |[x]: [Tensor<4>; 1]| {
            let own = cpu().burn;
            let shape = [s.cout, s.cin, s.kernel, s.kernel];
            let weight = upload(&values, shape, &own).autodiff();
            let bias = tensor(4, [s.cout], &own).autodiff();
            channels_last(tensor_ops::conv(channels_first(x), weight, bias, s))
        };
        let what = format!("{s:?} in {storage:?}");
        agree(&what, [[b, h, w, s.cin]], 1e-5, kernel, plain);
        rows_do_not_matter(&what, [[b, h, w, s.cin]], kernel);
    }
}

#[test]
fn frozen_linear_takes_weights_as_they_are_stored() {
    for [m, k, n] in [[1, 5, 3], [7, 64, 66], [70, 320, 96], [3, 544, 33]] {
        for storage in [Storage::F32, Storage::F16, Storage::Q8, Storage::Q4] {
            let weight = |device: &Device| {
                std::sync::Arc::new(FrozenWeight::new(draw(3, k * n), [k, n], storage, device))
            };
            let mut matrix = vec![0.0; k * n];
            weight(&cpu().burn).on_host().read(0, n, &mut matrix);
            let kernel = |[x]: [Tensor<3>; 1]| {
                let device = x.device().without_autodiff();
                frozen_linear(x, &weight(&device), Some(&tensor(4, [n], &device)), None)
            };
            let plain = |[x]: [Tensor<3>; 1]| {
                let own = cpu().burn;
                let matrix = upload(&matrix, [k, n], &own).autodiff();
                tensor_ops::linear(x, matrix, tensor(4, [n], &own).autodiff())
            };
            let what = format!("{m}x{k}x{n} in {storage:?}");
            agree(&what, [[2, m, k]], 1e-5, kernel, plain);
            rows_do_not_matter(&what, [[2, m, k]], kernel);
        }
    }
}

#[test]
fn quantised_weights_are_within_half_a_step() {
    let (k, n) = (64, 7);
    let values = draw(3, k * n);
    for (storage, most) in [(Storage::Q8, 127.0), (Storage::Q4, 7.0)] {
        let weight = FrozenWeight::new(values.clone(), [k, n], storage, &cpu().burn);
        let mut found = vec![0.0; k * n];
        weight.on_host().read(0, n, &mut found);
        for (i, (found, exact)) in found.iter().zip(&values).enumerate() {
            let block = (0..32).map(|r| values[(i / n / 32 * 32 + r) * n + i % n].abs());
            let step = block.fold(0.0, f32::max) / most;
            assert!((found - exact).abs() <= 0.5001 * step, "{storage:?}: {found} for {exact}");
        }
        assert_ne!(found, values, "{storage:?} rounds");
    }
}

#[test]
fn attention_is_softmax_of_scores_times_values() {
    for ([b, heads, tq, tk, d], bias) in [
        ([2, 3, 5, 7, 8], None),
        ([2, 2, 77, 77, 16], Some([1, 1, 77, 77])),
        ([3, 2, 70, 33, 40], Some([3, 1, 1, 33])),
        ([1, 4, 1, 40, 5], Some([1, 4, 1, 40])),
        ([2, 1, 65, 600, 64], None),
        ([1, 1, 40, 40, 512], None),
    ] {
        let scale = 1.0 / (d as f64).sqrt();
        let kernel = |[q, k, v]: [Tensor<3>; 3]| {
            let device = q.device().without_autodiff();
            let rows = q.dims()[0];
            let bias = bias.map(|shape| {
                let all = tensor(9, shape, &device);
                // Of one image where the batch is cut.
                if shape[0] > rows { all.narrow(0, shape[0] - rows, rows) } else { all }
            });
            attention(q, k, v, bias, Heads { heads, scale })
        };
        let plain = |[q, k, v]: [Tensor<3>; 3]| {
            let bias = bias.map(|shape| tensor(9, shape, &cpu().burn).autodiff());
            tensor_ops::attention(q, k, v, bias, Heads { heads, scale })
        };
        let shapes = [[b, tq, heads * d], [b, tk, heads * d], [b, tk, heads * d]];
        let what = format!("{b}x{heads}x{tq}x{tk}x{d}, bias {bias:?}");
        // The gradient of 600 keys is a small difference of larger numbers.
        agree(&what, shapes, 2e-5, kernel, plain);
        rows_do_not_matter(&what, shapes, kernel);
    }
}

/// With `--compute f16` products take f16 and are added up in f32: off by what rounding both sides
/// leaves, and not by nothing, in both sets of kernels.
#[test]
fn f16_is_as_exact_as_its_inputs() {
    let attends = |[q, k, v]: [Tensor<3>; 3]| {
        attention(q, k, v, None, Heads { heads: 2, scale: 1.0 / 40f64.sqrt() })
    };
    let s = ConvShape { cin: 24, cout: 20, kernel: 3, stride: 1, padding: 1 };
    let values = draw(3, s.cout * s.cin * 9);
    let convolves = |[x]: [Tensor<4>; 1]| {
        let device = x.device().without_autodiff();
        frozen_conv(x, &FrozenConv::of(&values, s, None, Storage::F32, &device))
    };
    let multiplies = |[x]: [Tensor<3>; 1]| {
        let device = x.device().without_autodiff();
        let weight = FrozenWeight::new(draw(3, 70 * 33), [70, 33], Storage::F32, &device);
        frozen_linear(x, &weight.into(), None, None)
    };
    for by_tiles in [false, true] {
        let half = gpu_with(Opening { compute: ComputeType::F16, by_tiles });
        let near = |what: &str, found: Vec<Vec<f32>>, expected: Vec<Vec<f32>>| {
            for (found, expected) in found.iter().zip(&expected) {
                let off = relative_error(found, expected);
                assert!((1e-6..5e-3).contains(&off), "{what}, by tiles {by_tiles}: off by {off:e}");
            }
        };
        let tokens = |i, device: &Device| tensor(i, [2, 50, 80], device);
        let three = |device: &Device| [1, 2, 3].map(|i| tokens(i, device));
        near("attention", run(&three(&half.burn), attends), run(&three(&cpu().burn), attends));
        let image = |device: &Device| [tensor(1, [2, 9, 9, 24], device)];
        let (found, exact) =
            (run(&image(&half.burn), convolves), run(&image(&cpu().burn), convolves));
        near("frozen_conv", found, exact);
        let rows = |device: &Device| [tensor(1, [2, 40, 70], device)];
        let (found, exact) =
            (run(&rows(&half.burn), multiplies), run(&rows(&cpu().burn), multiplies));
        near("frozen_linear", found, exact);
        // What f16 cannot hold is the largest that it can, and no infinity.
        let large: Tensor<3> = upload(&vec![1e9; 2 * 40 * 70], [2, 40, 70], &half.burn);
        assert!(read(&multiplies([large])).unwrap().iter().all(|v| v.is_finite()));
    }
}
