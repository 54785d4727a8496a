//! Adapters beside frozen layers, on the CPU and as shaders: value and gradients against Burn's own
//! operations, at ranks that are one, few and many.

use burn::tensor::{Device, Tensor};
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::kernels::frozen_conv::ConvShape;
use pcpo_wgpu::kernels::frozen_linear::{LowRank, frozen_linear};
use pcpo_wgpu::kernels::frozen_weight::{FrozenWeight, Storage};
use pcpo_wgpu::kernels::low_rank::low_rank;
use pcpo_wgpu::kernels::tensor_ops;
use pcpo_wgpu::model::nn::{channels_first, channels_last};
use pcpo_wgpu::tools::errors::relative_error;

use crate::kernels::{agree, devices, tensor};
use crate::support::cpu;

#[test]
fn frozen_linear_trains_its_adapter() {
    let (m, k, n) = (150, 40, 24);
    for r in [1, 4, 16] {
        for device in devices() {
            let run = |plain: bool, device: &Device| {
                let x = tensor(1, [2, m, k], device).autodiff().require_grad();
                let a = tensor(2, [k, r], device).autodiff().require_grad();
                let b = tensor(3, [r, n], device).autodiff().require_grad();
                let (w, g) = (tensor(4, [k, n], device), tensor(5, [2, m, n], device).autodiff());
                let y = if plain {
                    let by = |x: Tensor<3>, w: Tensor<2>| x.matmul(w.unsqueeze::<3>());
                    by(x.clone(), w.autodiff()) + by(by(x.clone(), a.clone()), b.clone()) * 0.5
                } else {
                    let w = FrozenWeight::new(read(&w).unwrap(), [k, n], Storage::F32, device);
                    let low = LowRank { a: &a, b: &b, scale: 0.5 };
                    frozen_linear(x.clone(), &w.into(), None, Some(low))
                };
                let mut grads = (y.clone() * g).sum().backward();
                let x = read(&x.grad_remove(&mut grads).unwrap()).unwrap();
                let [a, b] = [a, b].map(|t| read(&t.grad_remove(&mut grads).unwrap()).unwrap());
                [read(&y.inner()).unwrap(), x, a, b]
            };
            for (found, expected) in run(false, &device).iter().zip(&run(true, &cpu().burn)) {
                let off = relative_error(found, expected);
                assert!(off < 1e-5, "rank {r} on {device:?}: off by {off:e}");
            }
        }
    }
}

/// A convolution's adapter is a convolution to its rank and one of a single place from there.
#[test]
fn low_rank_is_two_convolutions() {
    let shape = |kernel, stride, padding| ConvShape { cin: 6, cout: 10, kernel, stride, padding };
    for s in [shape(3, 1, 1), shape(3, 2, 1), shape(1, 1, 0)] {
        for r in [1, 4, 16] {
            let inner = s.kernel * s.kernel * s.cin;
            let shapes = [[2, 7, 6, s.cin], [1, 1, inner, r], [1, 1, r, s.cout]];
            let matrices =
                |a: Tensor<4>, b: Tensor<4>| (a.reshape([inner, r]), b.reshape([r, s.cout]));
            let kernel = |[x, a, b]: [Tensor<4>; 3]| {
                let (a, b) = matrices(a, b);
                low_rank(x, s, LowRank { a: &a, b: &b, scale: 0.5 })
            };
            let plain = |[x, a, b]: [Tensor<4>; 3]| {
                let (a, b) = matrices(a, b);
                let places = [s.kernel, s.kernel, s.cin, r];
                let weight = a.reshape(places).permute([3, 2, 0, 1]);
                let bias = Tensor::zeros([r], &cpu().burn).autodiff();
                let to_rank = ConvShape { cout: r, ..s };
                let down = tensor_ops::conv(channels_first(x), weight, bias, to_rank);
                let down = channels_last(down);
                let [images, h, w, _] = down.dims();
                let up = down.reshape([images * h * w, r]).matmul(b) * 0.5;
                up.reshape([images, h, w, s.cout])
            };
            agree(&format!("{s:?} of rank {r}"), shapes, 1e-5, kernel, plain);
        }
    }
}
