// Shared by all kernels that take a sample in blocks: the uniforms, which thread takes what, and
// the layout of partial sums. Kept in sync with src/ops/context.rs (`Params`).

struct Params {
    batch: u32, dim: u32, blocks: u32, guided: u32,
    key_lo: u32, key_hi: u32, first_image: u32, step: u32,
    guidance: f32, a: f32, b: f32, sigma: f32,
    log_norm: f32, x0_x: f32, x0_p: f32, root_prev: f32,
    clip: f32, w: f32, w_native: f32, rounds: u32,
    clip_range: f32, scale: f32, beta: f32, grad_uncond: f32,
    log_hi: f32, log_lo: f32, with_base: u32, stream: u32,
    with_direction: u32, quadratic: f32, loss_weight: f32, pad: u32,
}

@group(0) @binding(0) var<uniform> uniforms: Params;
// Each thread's own copy, which its first line makes: beside stores to buffers a driver reads
// uniforms over and over.
var<private> params: Params;

// Threads of a workgroup, and of a run; THREADS in src/ops/context.rs.
const THREADS: u32 = 64u;
const RUN: u32 = 8u;

// A workgroup takes a block of THREADS x rounds units of WIDTH elements; a run of eight threads
// takes an eighth of it from end to end, eight neighbours at a time. That is whole cache lines for
// a GPU, and one stream for a processor that runs eight threads as one vector: with the threads of
// a group side by side instead it takes twice to three times as long.
fn units() -> u32 { return params.dim / WIDTH; }
fn first_unit(group: vec3<u32>, thread: u32) -> u32 {
    return (group.x * THREADS + thread - thread % RUN) * params.rounds + thread % RUN;
}
fn end_unit(first: u32) -> u32 { return min(first + params.rounds * RUN, units()); }

// Sums over a sample are deterministic: every thread leaves the sum of its elements, and a second
// kernel adds these up in order. Without a barrier here, which costs software Vulkan more than the
// arithmetic.
fn partial_index(group: vec3<u32>, thread: u32) -> u32 {
    return (group.y * params.blocks + group.x) * THREADS + thread;
}
