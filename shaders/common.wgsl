// Shared by all kernels: the uniforms and the fixed reduction tree. Kept in sync with src/ops/mod.rs (`Params`).

struct Params {
    batch: u32, dim: u32, blocks: u32, guided: u32,
    key_lo: u32, key_hi: u32, first_image: u32, step: u32,
    guidance: f32, a: f32, b: f32, sigma: f32,
    log_norm: f32, x0_x: f32, x0_p: f32, root_prev: f32,
    clip: f32, w: f32, w_native: f32, objective: u32,
    xi: f32, scale: f32, beta: f32, grad_uncond: f32,
    log_hi: f32, log_lo: f32, with_reference: u32, stream: u32,
    with_direction: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

const THREADS: u32 = 256u;
// Elements that one workgroup takes of one sample; BLOCK in src/ops/mod.rs.
const BLOCK: u32 = 4096u;

var<workgroup> tree: array<vec2<f32>, 256>;

// Sum over the workgroup in a fixed tree: the same order on every run, so results repeat to the bit.
fn tree_sum(thread: u32, value: vec2<f32>) -> vec2<f32> {
    tree[thread] = value;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half = half / 2u) {
        if thread < half { tree[thread] += tree[thread + half]; }
        workgroupBarrier();
    }
    return tree[0];
}
