//! A forward pass that can be differentiated: at once, or block by block. Block by block only the
//! blocks' inputs are kept; each block runs again when its turn comes, on a few rows at a time, so
//! that the activations of one block and these rows are all that is held (activation checkpointing,
//! Chen et al. 2016).

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};

use crate::device::Compute;
use crate::lora::{Adapter, Lora};
use crate::model::denoiser::Hidden;
use crate::model::{Denoiser, Inputs};

/// One adapter on a device in its two roles: equal values.
#[derive(Clone, Copy)]
pub struct LoraPair<'a> {
    /// Collects gradients.
    pub tracked: &'a Lora,
    pub frozen: &'a Lora,
}

/// Squares that are added up on the device, each sum by one thread; the host adds up the sums.
const SQUARES: usize = 256;

/// Values that are joined into one tensor at most, unless one matrix has more: a binding of every
/// device holds so many.
const JOINED: usize = 1 << 24;

/// Which of an adapter's matrices are joined, in their order.
pub fn joined(adapter: &Adapter) -> Vec<Range<usize>> {
    join(adapter.parameters().map(Vec::len), JOINED)
}

fn join(lengths: impl Iterator<Item = usize>, most: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut whole = 0;
    for (i, length) in lengths.enumerate() {
        whole += length;
        match parts.last_mut() {
            Some(part) if whole <= most => part.end = i + 1,
            _ => {
                whole = length;
                parts.push(i..i + 1);
            }
        }
    }
    parts
}

/// What ended steps leave on the device.
#[derive(Default)]
pub struct StepSums {
    /// The sum of their gradients: a tensor for each of [`joined`], with zeros at its end.
    pub gradient: Vec<Tensor<1>>,
    pub steps: Vec<EndedStep>,
}

/// What an ended step leaves beside its gradient.
pub struct EndedStep {
    /// Its place in the epoch's trained ones.
    pub at: usize,
    /// Of its rows, `[B, STATS]`.
    pub stats: Tensor<2>,
    /// Sums of the squares of its gradient, which the host adds up.
    pub squares: Tensor<1>,
}

/// Gradients of an adapter's matrices, A and B of each layer, added up over the backward passes of
/// a step, and those over steps.
pub struct GradientAccumulator<'a> {
    adapter: &'a Adapter,
    tracked: &'a Lora,
    /// Of the step that is not ended, a matrix each.
    step: Vec<Option<Tensor<2>>>,
    ended: StepSums,
    /// Whether gradients pass through products in f16.
    half: bool,
    /// What the gradient that is passing was divided by.
    scale: Option<Tensor<2>>,
}

impl<'a> GradientAccumulator<'a> {
    /// `tracked` is the adapter on a device, with gradients.
    pub fn new(adapter: &'a Adapter, tracked: &'a Lora, compute: &Compute) -> Self {
        let half = compute.gpu.as_ref().is_some_and(|gpu| gpu.kernels.half);
        let step = vec![None; 2 * adapter.layers.len()];
        Self { adapter, tracked, step, ended: StepSums::default(), half, scale: None }
    }

    /// A gradient of which f16 flushes nothing: its largest entry is 1.
    fn scaled(&mut self, gradient: Tensor<4>) -> Tensor<4> {
        if !self.half {
            return gradient;
        }
        // A gradient of zeros stays one.
        let largest = gradient.clone().abs().max().clamp_min(f32::MIN_POSITIVE);
        self.scale = Some(largest.clone().unsqueeze());
        gradient / largest.unsqueeze()
    }

    /// Adds what a backward pass left at the adapter's matrices.
    fn take(&mut self, grads: &mut Gradients) {
        for (layer, sums) in self.adapter.layers.iter().zip(self.step.chunks_mut(2)) {
            let pair = self.tracked.get(&layer.name).expect("the adapter's own layer");
            for (matrix, sum) in [&pair.a, &pair.b].into_iter().zip(sums) {
                // Layers behind a detached branch, or of another block, get no gradient.
                if let Some(g) = matrix.grad_remove(grads) {
                    let g = match &self.scale {
                        Some(scale) => g * scale.clone(),
                        None => g,
                    };
                    *sum = Some(match sum.take() {
                        Some(s) => s + g,
                        None => g,
                    });
                }
            }
        }
    }

    /// Ends a step: what arrived in it joins the sum, and its size and its rows' statistics are
    /// kept.
    pub fn end_step(&mut self, at: usize, stats: Tensor<2>) {
        let device = &stats.device();
        let lengths: Vec<usize> = self.adapter.parameters().map(Vec::len).collect();
        let mut squares = Vec::new();
        let mut sums = std::mem::take(&mut self.ended.gradient).into_iter();
        for part in joined(self.adapter) {
            let length: usize = lengths[part.clone()].iter().sum();
            let rows = length.div_ceil(SQUARES);
            // Nothing arrives at layers whose output goes nowhere.
            let own = part.map(|i| match self.step[i].take() {
                Some(own) => own.reshape([lengths[i]]),
                None => Tensor::zeros([lengths[i]], device),
            });
            let mut own: Vec<Tensor<1>> = own.collect();
            if rows * SQUARES > length {
                own.push(Tensor::zeros([rows * SQUARES - length], device));
            }
            let own = Tensor::cat(own, 0);
            let square = own.clone().powi_scalar(2).reshape([rows, SQUARES]).sum_dim(1);
            squares.push(square.reshape([rows]));
            self.ended.gradient.push(match sums.next() {
                Some(sum) => sum + own,
                None => own,
            });
        }
        self.ended.steps.push(EndedStep { at, stats, squares: Tensor::cat(squares, 0) });
    }

    /// What the ended steps leave.
    pub fn finish(self) -> StepSums {
        self.ended
    }
}

/// A forward pass that waits for the gradient of its output.
pub enum Forward<'a> {
    /// The tracked output.
    Whole(Tensor<4>),
    Blocks(Blocks<'a>),
}

/// A pass whose blocks are differentiated one after the other.
pub struct Blocks<'a> {
    net: &'a dyn Denoiser,
    tracked: &'a Lora,
    /// The input of each block, then of the network's end; not tracked.
    inputs: Vec<Hidden>,
    output: Tensor<4>,
    /// Rows that a block is differentiated for at a time.
    rows: usize,
}

impl<'a> Forward<'a> {
    /// Runs the network. `rows_at_once` is how many rows a block is differentiated for at a time;
    /// without it the whole network is at once.
    pub fn run(
        net: &'a dyn Denoiser,
        x: Tensor<4>,
        inputs: Inputs,
        lora: LoraPair<'a>,
        rows_at_once: Option<usize>,
    ) -> Self {
        let Some(rows) = rows_at_once else {
            return Self::Whole(net.forward(x, inputs, Some(lora.tracked)));
        };
        let mut states = vec![net.start(x, inputs)];
        for i in 0..net.blocks() {
            let next = net.block(i, states[i].clone(), Some(lora.frozen));
            states.push(next);
        }
        let output = net.finish(states[net.blocks()].clone());
        Self::Blocks(Blocks { net, tracked: lora.tracked, inputs: states, output, rows })
    }

    /// The output, not tracked.
    pub fn output(&self) -> Tensor<4> {
        match self {
            Self::Whole(output) => output.clone().inner(),
            Self::Blocks(blocks) => blocks.output.clone(),
        }
    }

    /// Carries the gradient of a loss with respect to the output into the adapter: the derivative
    /// of `(output * gradient).sum()` by the output is the gradient.
    pub fn backward(self, gradient: Tensor<4>, sums: &mut GradientAccumulator) {
        let gradient = sums.scaled(gradient);
        match self {
            Self::Whole(output) => {
                sums.take(&mut (output * gradient.autodiff()).sum().backward());
            }
            Self::Blocks(blocks) => blocks.backward(gradient, sums),
        }
    }
}

impl Blocks<'_> {
    fn backward(mut self, gradient: Tensor<4>, sums: &mut GradientAccumulator) {
        let last = self.inputs.pop().expect("the network's end has an input");
        let end = Leaves::of(&last);
        let mut grads = (self.net.finish(end.hidden) * gradient.autodiff()).sum().backward();
        let mut incoming: Incoming = end.leaves.iter().map(|l| l.grad_remove(&mut grads)).collect();
        while let Some(before) = self.inputs.pop() {
            match self.through_block(self.inputs.len(), &before, &incoming, sums) {
                Some(next) => incoming = next,
                // Nothing that is trained lies before this block.
                None => return,
            }
        }
    }

    /// The gradients of block `i`'s input from those of its output, a few rows at a time.
    fn through_block(
        &self,
        i: usize,
        before: &Hidden,
        incoming: &Incoming,
        sums: &mut GradientAccumulator,
    ) -> Option<Incoming> {
        let total = before.len();
        let mut parts: Vec<Incoming> = Vec::new();
        let _kept = self.net.keep(i);
        for start in (0..total).step_by(self.rows) {
            let n = self.rows.min(total - start);
            let Leaves { leaves, hidden } = Leaves::of(&before.rows(start, n));
            let output = self.net.block(i, hidden, Some(self.tracked));
            let term = |(out, g): (Tensor<4>, &Option<Tensor<4>>)| {
                Some((out * g.clone()?.narrow(0, start, n).autodiff()).sum())
            };
            let terms = output.flow.into_iter().zip(incoming).filter_map(term);
            let mut grads = terms.reduce(|a, b| a + b)?.backward();
            parts.push(leaves.iter().map(|l| l.grad_remove(&mut grads)).collect());
            sums.take(&mut grads);
        }
        let column = |k: usize| {
            let rows: Option<Vec<Tensor<4>>> = parts.iter().map(|p| p[k].clone()).collect();
            rows.map(|rows| Tensor::cat(rows, 0))
        };
        Some((0..before.flow.len()).map(column).collect())
    }
}

/// The gradient of each tensor of a [`Hidden`], where one arrived.
type Incoming = Vec<Option<Tensor<4>>>;

/// A hidden state whose tensors collect gradients.
struct Leaves {
    leaves: Vec<Tensor<4>>,
    hidden: Hidden,
}

impl Leaves {
    fn of(hidden: &Hidden) -> Self {
        let track = |t: &Tensor<4>| t.clone().autodiff().require_grad();
        let leaves: Vec<Tensor<4>> = hidden.flow.iter().map(track).collect();
        Self { hidden: hidden.with(leaves.clone()), leaves }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_joined_as_far_as_a_binding_goes() {
        let parts = |lengths: &[usize]| join(lengths.iter().copied(), 10);
        assert_eq!(parts(&[4, 6, 1, 9, 1]), [0..2, 2..4, 4..5]);
        // One that is larger stands alone.
        assert_eq!(parts(&[11, 3, 25, 2, 2]), [0..1, 1..2, 2..3, 3..5]);
        assert!(parts(&[]).is_empty());
    }
}
