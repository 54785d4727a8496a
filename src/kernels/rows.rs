//! Some of a tensor's rows, a row as often as it is named, and what arrives at each of them added
//! up. On the CPU they are copied whole; elsewhere they are Burn's selection.

use burn::tensor::Tensor;

use super::cpu::{Values, tensor};
use super::node::{input, node, output};
use crate::device::gpu::Gpu;
use crate::device::tensor::index;

/// Rows `at` of `[rows, ..]`, in that order: `[at, ..]`.
pub fn rows_of<const D: usize>(all: &Tensor<D>, at: &[usize]) -> Tensor<D> {
    if Gpu::of(all).is_some() {
        return all.clone().select(0, index(at, &all.device()));
    }
    let shape = all.dims();
    let width: usize = shape[1..].iter().product();
    let parents = [input(all)];
    let values = Values::of(&all.clone().inner());
    let mut out = Vec::with_capacity(at.len() * width);
    at.iter().for_each(|row| out.extend_from_slice(&values[row * width..][..width]));
    let mut taken = shape;
    taken[0] = at.len();
    let at = at.to_vec();
    node(parents, tensor(out, taken), move |g: Tensor<D>, _| {
        let (g, mut sums) = (Values::of(&g), vec![0.0; shape.iter().product()]);
        for (row, g) in at.iter().zip(g.chunks_exact(width.max(1))) {
            sums[row * width..][..width].iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
        }
        [output(tensor(sums, shape))]
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::device::tensor::{host, upload};

    #[test]
    fn rows_and_their_gradient_are_those_of_burns_selection() {
        let values: Vec<f32> = (0..24).map(|i| (i * i) as f32 / 7.0).collect();
        let given = upload(&values, [4, 2, 3], &Device::flex());
        let at = [2, 0, 2, 3, 2];
        let g = (0..30).map(|i| 0.1 + i as f32).collect::<Vec<f32>>();
        let g = upload(&g, [5, 2, 3], &Device::flex()).autodiff();
        let run = |select: &dyn Fn(&Tensor<3>) -> Tensor<3>| {
            // Out of order, as a permutation leaves it.
            let leaf = given.clone().swap_dims(1, 2).autodiff().require_grad();
            let y = select(&leaf.clone().swap_dims(1, 2));
            let mut grads = (y.clone() * g.clone()).sum().backward();
            [host(&y.inner()), host(&leaf.grad_remove(&mut grads).unwrap())]
        };
        let burns = |x: &Tensor<3>| x.clone().select(0, index(&at, &x.device()));
        assert_eq!(run(&|x| rows_of(x, &at)), run(&burns));
    }
}
