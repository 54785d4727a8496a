//! The GPU's path of [`super::attention`].

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::gpu::{computing, grid, in_parts, launch};
use super::node::{node, output};
use crate::device::gpu::{
    self, Buffer, Gpu, Kernel, Kernels, buffer, kernel, lanes, output as empty,
};

/// Added to a variant's number where subgroups are eight wide.
pub(super) const EIGHTS: u32 = 1 << 16;
/// Added where products take f16.
pub(super) const HALF: u32 = 1 << 17;

/// Units of eight columns that a result holds in registers where subgroups are eight wide.
const MOST_UNITS: usize = 8;

/// Declares a kernel of what both its sets are given, what those by tiles share, and what those
/// share whose subgroups are eight wide and whose own files are in `shaders/eights/`.
macro_rules! kernel_of_both {
    (
        $name:literal or $eight:literal,
        [$($given:literal),*], [$($tile:literal),*], [$($eights:literal),*]
    ) => {
        Kernel {
            name: $name,
            source: |variant| {
                const TILES: Kernel = kernel!(begins beginning, $name $(, $given)* $(, $tile)*);
                const EIGHT: Kernel = kernel!(begins beginning, $eight $(, $given)* $(, $eights)*);
                let own = if variant & EIGHTS == 0 { TILES } else { EIGHT };
                (own.source)(variant)
            },
        }
    };
}

/// The source's beginning: what products take, the width of a head, and how buffers are read.
fn beginning(variant: u32) -> String {
    let (head, eights) = (variant % EIGHTS, variant & EIGHTS != 0);
    let width = gpu::width(head as usize);
    let (lanes, reading) = match (eights, width) {
        (true, _) => (lanes(1), format!("const MOST: u32 = {MOST_UNITS}u;")),
        (false, 4) => (lanes(4), include_str!("../../shaders/shared/attention4.wgsl").into()),
        (false, _) => (lanes(1), include_str!("../../shaders/shared/attention1.wgsl").into()),
    };
    let computing = computing(variant & HALF != 0, eights);
    format!("{computing}\nconst HEAD: u32 = {head}u;\n{lanes}\n{reading}")
}

pub(super) const FORWARD: Kernel = kernel_of_both!(
    "attention" or "eights/attention",
    ["attention_bindings"], ["attention_tile", "attention_queries"],
    ["eights", "attention_eights"]
);
pub(super) const DELTA: Kernel = kernel!("attention_delta");
pub(super) const GRADIENT_Q: Kernel = kernel_of_both!(
    "attention_gradient_q" or "eights/attention_gradient_q",
    ["attention_bindings", "attention_given"],
    ["attention_tile", "attention_queries", "attention_given_tile"],
    ["eights", "attention_eights", "attention_given_eights"]
);
pub(super) const GRADIENT_KV: Kernel = kernel_of_both!(
    "attention_gradient_kv" or "eights/attention_gradient_kv",
    ["attention_bindings", "attention_given"], ["attention_tile", "attention_given_tile"],
    ["eights", "attention_eights", "attention_given_eights"]
);

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
    let (Kernels { eights, half, .. }, units) = (gpu.kernels, head.div_ceil(8));
    let variant = head as u32 + EIGHTS * u32::from(eights) + HALF * u32::from(half);
    let blocks = move |rows: usize, most: usize| {
        let blocks = rows.div_ceil(TILE) * b * heads;
        // A subgroup a block, eight a workgroup.
        let eight = || (blocks * units.div_ceil(MOST_UNITS)).div_ceil(8);
        if eights { eight() } else { blocks * slices(head, most) }
    };
    // Two products for each pair of rows and column, twice as many backward.
    let products = move |inner: usize| TILE * inner * head * if eights { 16 } else { 2 };
    let run = move |gpu: &Gpu, kernel: Kernel, bindings: &[&Buffer], groups: usize, each: usize| {
        in_parts(gpu, bindings[0], groups, each, |first, grid| {
            launch(gpu, kernel, variant, &Sizes { first, ..sizes }, bindings, grid);
        });
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
