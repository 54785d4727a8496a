//! A kernel as one node of Burn's graph of gradients: its output on one side, on the other how the
//! gradient of the output becomes those of the inputs. A node knows nothing of backends; here they
//! are told apart.

use std::fmt;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, BackendTensor, Cube, Dispatch, DispatchAutodiffContext,
    DispatchTensor, DispatchTensorKind, Flex,
};
use burn::tensor::Tensor;

/// The gradients of `N` inputs from that of the output; asked for those that are wanted only. What
/// it gives beside these is dropped.
type Gradient<const N: usize> =
    dyn Fn(DispatchTensor, [bool; N]) -> [Option<DispatchTensor>; N] + Send + Sync;

/// A tensor as a node takes it.
pub fn input<const D: usize>(tensor: &Tensor<D>) -> DispatchTensor {
    tensor.clone().into_dispatch()
}

/// A gradient as a node gives it.
pub fn output<const D: usize>(tensor: Tensor<D>) -> Option<DispatchTensor> {
    Some(tensor.into_dispatch())
}

/// The result of a kernel, which was computed without gradients, tied to its inputs; as it is where
/// none of them collects gradients.
pub fn node<const N: usize, const D: usize>(
    inputs: [DispatchTensor; N],
    result: Tensor<D>,
    gradient: impl Fn(Tensor<D>, [bool; N]) -> [Option<DispatchTensor>; N] + Send + Sync + 'static,
) -> Tensor<D> {
    if !inputs.iter().any(Dispatch::is_tracked) {
        return result;
    }
    let merged = |all: DispatchAutodiffContext, one: &DispatchTensor| all.merge(one.autodiff);
    let autodiff = inputs.iter().fold(DispatchAutodiffContext::Disabled, merged);
    let gradient: Arc<Gradient<N>> =
        Arc::new(move |g, wanted| gradient(Tensor::from_dispatch(g), wanted));
    let kind = match result.into_dispatch().kind {
        DispatchTensorKind::Flex(y) => tie::<Flex, N>(inputs, y.float(), gradient),
        DispatchTensorKind::Cube(y) => tie::<Cube, N>(inputs, y.float(), gradient),
        DispatchTensorKind::Autodiff(_) => unreachable!("a kernel computes without gradients"),
    };
    let kind = DispatchTensorKind::Autodiff(Box::new(kind));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff })
}

/// A backend that kernels run on.
trait Home: Backend {
    fn hold(tensor: BackendTensor<Self>) -> DispatchTensorKind;
    fn take(kind: DispatchTensorKind) -> BackendTensor<Self>;
}

impl Home for Flex {
    fn hold(tensor: BackendTensor<Self>) -> DispatchTensorKind {
        DispatchTensorKind::Flex(tensor)
    }

    fn take(kind: DispatchTensorKind) -> BackendTensor<Self> {
        let DispatchTensorKind::Flex(tensor) = kind else { mixed() };
        tensor
    }
}

impl Home for Cube {
    fn hold(tensor: BackendTensor<Self>) -> DispatchTensorKind {
        DispatchTensorKind::Cube(tensor)
    }

    fn take(kind: DispatchTensorKind) -> BackendTensor<Self> {
        let DispatchTensorKind::Cube(tensor) = kind else { mixed() };
        tensor
    }
}

fn mixed() -> ! {
    panic!("a kernel was given tensors of two devices")
}

struct State<const N: usize>(Arc<Gradient<N>>);

impl<const N: usize> Clone for State<N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<const N: usize> fmt::Debug for State<N> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the gradient of a kernel")
    }
}

#[derive(Debug)]
struct KernelStep;

impl<B: Home, const N: usize> Backward<B, N> for KernelStep {
    type State = State<N>;

    fn backward(self, ops: Ops<State<N>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = BackendTensor::Float(grads.consume::<B>(&ops.node));
        let g = DispatchTensor { kind: B::hold(g), autodiff: DispatchAutodiffContext::Disabled };
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let all = (ops.state.0)(g, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(all) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, B::take(gradient.kind).float());
            }
        }
    }
}

fn tie<B: Home, const N: usize>(
    inputs: [DispatchTensor; N],
    output: B::FloatTensorPrimitive,
    gradient: Arc<Gradient<N>>,
) -> DispatchTensorKind {
    let guard = |input: DispatchTensor| match input.kind {
        DispatchTensorKind::Autodiff(kind) => B::take(*kind).autodiff().node(),
        // A constant.
        kind => Autodiff::<B>::from_inner(B::take(kind).float()).node(),
    };
    let step = Backward::<B, N>::prepare::<NoCheckpointing>(KernelStep, inputs.map(guard));
    let tied = match step.compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish(State(gradient), output),
        OpsKind::UnTracked(step) => step.finish(output),
    };
    B::hold(BackendTensor::Autodiff(tied))
}
