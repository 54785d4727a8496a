//! The GPU's path of [`super::attention`].

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::gpu::{computing, grid, launch, submissions};
use super::node::{node, output};
use crate::device::gpu::{self, Buffer, Gpu, Kernel, buffer, kernel, lanes, output as empty};

/// Added to a variant's number where subgroups are eight wide.
pub(super) const EIGHTS: u32 = 1 << 16;
/// Added where products take f16.
pub(super) const HALF: u32 = 1 << 17;

/// Units of eight columns that a result holds in registers where subgroups are eight wide.
const MOST_UNITS: usize = 8;

/// Declares a kernel with its variant for subgroups that are eight wide, whose number is the width
/// of a head and [`EIGHTS`].
macro_rules! kernel_of_both {
    ($name:literal $(, $shared:literal)*) => {
        Kernel {
            name: $name,
            source: |variant| {
                if variant & EIGHTS == 0 {
                    const OWN: Kernel = kernel!(begins beginning, $name $(, $shared)*);
                    return (OWN.source)(variant);
                }
                let head = variant % EIGHTS;
                let sizes = format!("const HEAD: u32 = {head}u;\nconst MOST: u32 = {MOST_UNITS}u;");
                let rest = concat!(
                    include_str!("../../shaders/shared/eights.wgsl"),
                    include_str!("../../shaders/shared/attention_eights.wgsl"),
                    include_str!(concat!("../../shaders/eights/", $name, ".wgsl"))
                );
                [computing(variant & HALF != 0, true), &sizes, rest].join("\n")
            },
        }
    };
}

/// The source's beginning for a variant by tiles.
fn beginning(variant: u32) -> String {
    let head = variant % EIGHTS;
    let width = gpu::width(head as usize);
    let inner = if width == 4 {
        include_str!("../../shaders/shared/attention4.wgsl")
    } else {
        include_str!("../../shaders/shared/attention1.wgsl")
    };
    let computing = computing(variant & HALF != 0, false);
    format!("{computing}\nconst HEAD: u32 = {head}u;\n{}\n{inner}", lanes(width))
}

pub(super) const FORWARD: Kernel =
    kernel_of_both!("attention", "attention_tile", "attention_queries");
pub(super) const DELTA: Kernel = kernel!("attention_delta");
pub(super) const GRADIENT_Q: Kernel = kernel_of_both!(
    "attention_gradient_q",
    "attention_tile",
    "attention_queries",
    "attention_given"
);
pub(super) const GRADIENT_KV: Kernel =
    kernel_of_both!("attention_gradient_kv", "attention_tile", "attention_given");

/// Sizes of one call.
#[derive(Clone, Copy)]
pub struct Call {
    pub heads: usize,
    pub scale: f32,
    /// Strides of the bias over images and heads; 0 where one is for all.
    pub bias: [usize; 2],
}

/// Kept in sync with `shaders/attention.wgsl` and its gradients.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Sizes {
    queries: u32,
    keys: u32,
    heads: u32,
    has_bias: u32,
    bias_batch: u32,
    bias_head: u32,
    scale: f32,
    splits: u32,
    batch: u32,
    first: u32,
    pad: [u32; 2],
}

/// Rows of a workgroup.
const TILE: usize = 32;

/// Workgroups that share a wide head's columns, where each holds at most so many chunks of 40.
fn slices(head: usize, most: usize) -> usize {
    let chunks = head.div_ceil(40);
    chunks.div_ceil(chunks.min(most))
}

/// `q` `[B, Tq, width]`, `k` and `v` `[B, Tk, width]`, without gradients; the bias `[.., Tq, Tk]`.
pub fn on_gpu(
    gpu: Gpu,
    [q, k, v]: [Tensor<3>; 3],
    bias: Option<Tensor<4>>,
    call: Call,
    parents: [DispatchTensor; 3],
) -> Tensor<3> {
    let ([b, tq, width], tk, device) = (q.dims(), k.dims()[1], q.device());
    let (heads, head) = (call.heads, width / call.heads);
    let sizes = Sizes {
        queries: tq as u32,
        keys: tk as u32,
        heads: heads as u32,
        has_bias: bias.is_some().into(),
        bias_batch: call.bias[0] as u32,
        bias_head: call.bias[1] as u32,
        scale: call.scale,
        splits: 1,
        batch: b as u32,
        first: 0,
        pad: [0; 2],
    };
    let (eights, units) = (gpu.eights, head.div_ceil(8));
    let variant = head as u32 + if eights { EIGHTS } else { 0 } + if gpu.half { HALF } else { 0 };
    let blocks = move |rows: usize, most: usize| {
        let blocks = rows.div_ceil(TILE) * b * heads;
        // A subgroup a block, eight a workgroup.
        let eight = || (blocks * units.div_ceil(MOST_UNITS)).div_ceil(8);
        if eights { eight() } else { blocks * slices(head, most) }
    };
    // Two products for each pair of rows and column, twice as many backward.
    let products = move |inner: usize| TILE * inner * head * if eights { 16 } else { 2 };
    let run = move |gpu: &Gpu, kernel: Kernel, bindings: &[&Buffer], groups: usize, each: usize| {
        for run in submissions(groups, each) {
            let sizes = Sizes { first: run.start as u32, ..sizes };
            launch(gpu, kernel, variant, &sizes, bindings, grid(run.len()));
        }
    };
    let (y, lse) = (empty([b, tq, width], &device), empty([b, heads, tq], &device));
    {
        let [qb, kb, vb] = [buffer(&q), buffer(&k), buffer(&v)];
        let own = bias.as_ref().map(buffer);
        let bias = own.as_ref().unwrap_or(&qb);
        let bindings = &[&qb, &kb, &vb, bias, &buffer(&y), &buffer(&lse)];
        run(&gpu, FORWARD, bindings, blocks(tq, 4), products(tk));
    }
    let out = y.clone();
    node(parents, y, move |g: Tensor<3>, _| {
        let rows = b * tq * heads;
        let delta = empty([b, heads, tq], &device);
        let [g, delta, lse] = [buffer(&g), buffer(&delta), buffer(&lse)];
        let own = [rows, tq, heads, head].map(|n| n as u32);
        let made = &buffer(&out);
        launch(&gpu, DELTA, gpu::width(head), &own, &[&g, made, &delta], grid(rows.div_ceil(64)));
        let [qb, kb, vb] = [buffer(&q), buffer(&k), buffer(&v)];
        let own = bias.as_ref().map(buffer);
        let bias = own.as_ref().unwrap_or(&qb);
        let [gq, gk, gv] = [tq, tk, tk].map(|t| empty([b, t, width], &device));
        let bindings = &[&qb, &kb, &vb, bias, &g, &lse, &delta, &buffer(&gq)];
        run(&gpu, GRADIENT_Q, bindings, blocks(tq, 4), 2 * products(tk));
        let bindings = &[&qb, &kb, &vb, bias, &g, &lse, &delta, &buffer(&gk), &buffer(&gv)];
        run(&gpu, GRADIENT_KV, bindings, blocks(tk, 2), 2 * products(tq));
        [output(gq), output(gk), output(gv)]
    })
}
