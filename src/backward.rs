//! A forward pass that can be differentiated: at once, or block by block. Block by block only the blocks' inputs are
//! kept; each block runs again when its turn comes, on a few rows at a time, so that the activations of one block and these
//! rows are all that is held (activation checkpointing, Chen et al. 2016).

use anyhow::Result;
use burn::tensor::Tensor;

use crate::lora::{Adapter, Lora};
use crate::model::denoiser::State;
use crate::model::{Denoiser, Inputs};

/// Gradients of an adapter's matrices, A and B of each layer, added up over backward passes.
pub struct Sums<'a> {
    adapter: &'a Adapter,
    lora: &'a Lora,
    sums: Vec<Option<Tensor<2>>>,
}

impl<'a> Sums<'a> {
    /// `lora` is the adapter on a device, with gradients.
    pub fn new(adapter: &'a Adapter, lora: &'a Lora) -> Self {
        Self { adapter, lora, sums: vec![None; 2 * adapter.layers.len()] }
    }

    /// Adds what a backward pass left at the adapter's matrices.
    fn take(&mut self, grads: &mut burn::tensor::Gradients) {
        for (layer, sums) in self.adapter.layers.iter().zip(self.sums.chunks_mut(2)) {
            let pair = self.lora.get(&layer.name).expect("the adapter's own layer");
            for (matrix, sum) in [&pair.a, &pair.b].into_iter().zip(sums) {
                // Layers behind a detached branch, or of another block, get no gradient.
                if let Some(g) = matrix.grad_remove(grads) {
                    *sum = Some(match sum.take() {
                        Some(s) => s + g,
                        None => g,
                    });
                }
            }
        }
    }

    /// The sums on the host, in the order of [`Adapter::parameters`]; zeros where nothing arrived.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(self) -> Result<Vec<Vec<f32>>> {
        let sizes = self.adapter.layers.iter().flat_map(|l| [l.a.len(), l.b.len()]);
        let read = |(sum, n): (Option<Tensor<2>>, usize)| match sum {
            Some(sum) => crate::ops::read(&sum),
            None => Ok(vec![0.0; n]),
        };
        self.sums.into_iter().zip(sizes).map(read).collect()
    }
}

/// A forward pass that waits for the gradient of its output.
pub enum Forward<'a> {
    /// The tracked output.
    Whole(Tensor<4>),
    /// The input of each block, then of the network's end; not tracked.
    Blocks { net: &'a dyn Denoiser, lora: &'a Lora, states: Vec<State>, output: Tensor<4>, rows: usize },
}

impl<'a> Forward<'a> {
    /// Runs the network. `lora` tracks gradients; `frozen` holds the same values and does not. `by_block` is how many
    /// rows a block is differentiated for at a time.
    pub fn run(
        net: &'a dyn Denoiser,
        x: Tensor<4>,
        inputs: Inputs,
        [lora, frozen]: [&'a Lora; 2],
        by_block: Option<usize>,
    ) -> Self {
        let Some(rows) = by_block else { return Self::Whole(net.forward(x, inputs, Some(lora))) };
        let mut states = vec![net.start(x, inputs)];
        for i in 0..net.blocks() {
            let next = net.block(i, states[i].clone(), Some(frozen));
            states.push(next);
        }
        let output = net.finish(states[net.blocks()].clone());
        Self::Blocks { net, lora, states, output, rows }
    }

    /// The output, not tracked.
    pub fn output(&self) -> Tensor<4> {
        match self {
            Self::Whole(output) => output.clone().inner(),
            Self::Blocks { output, .. } => output.clone(),
        }
    }

    /// Carries the gradient of a loss with respect to the output into the adapter: the derivative of
    /// `(output * gradient).sum()` by the output is the gradient.
    pub fn backward(self, gradient: Tensor<4>, sums: &mut Sums) {
        match self {
            Self::Whole(output) => sums.take(&mut (output * gradient.autodiff()).sum().backward()),
            Self::Blocks { net, lora, mut states, rows, .. } => {
                let last = states.pop().expect("the network's end has an input");
                let (inputs, state) = leaves(&last);
                let mut grads = (net.finish(state) * gradient.autodiff()).sum().backward();
                let mut incoming: Vec<Option<Tensor<4>>> = inputs.iter().map(|l| l.grad_remove(&mut grads)).collect();
                for (i, before) in states.into_iter().enumerate().rev() {
                    let total = before.len();
                    let mut parts = Vec::new();
                    for start in (0..total).step_by(rows) {
                        let n = rows.min(total - start);
                        let (inputs, state) = leaves(&before.rows(start, n));
                        let output = net.block(i, state, Some(lora));
                        let terms = output
                            .flow
                            .into_iter()
                            .zip(&incoming)
                            .filter_map(|(out, g)| Some((out * g.clone()?.narrow(0, start, n).autodiff()).sum()));
                        let Some(loss) = terms.reduce(|a, b| a + b) else { return };
                        let mut grads = loss.backward();
                        parts.push(inputs.iter().map(|l| l.grad_remove(&mut grads)).collect::<Vec<_>>());
                        sums.take(&mut grads);
                    }
                    incoming = (0..before.flow.len())
                        .map(|k| {
                            let column: Option<Vec<Tensor<4>>> = parts.iter().map(|p| p[k].clone()).collect();
                            column.map(|c| Tensor::cat(c, 0))
                        })
                        .collect();
                }
            }
        }
    }
}

/// A state whose tensors collect gradients, and these tensors.
fn leaves(state: &State) -> (Vec<Tensor<4>>, State) {
    let track = |t: &Tensor<4>| t.clone().autodiff().require_grad();
    let leaves: Vec<Tensor<4>> = state.flow.iter().map(track).collect();
    (leaves.clone(), state.with(leaves))
}
