// Shared by all kernels: the uniforms and the layout of partial sums. Kept in sync with src/ops/mod.rs (`Params`).

struct Params {
    batch: u32, dim: u32, blocks: u32, guided: u32,
    key_lo: u32, key_hi: u32, first_image: u32, step: u32,
    guidance: f32, a: f32, b: f32, sigma: f32,
    log_norm: f32, x0_x: f32, x0_p: f32, root_prev: f32,
    clip: f32, w: f32, w_native: f32, objective: u32,
    xi: f32, scale: f32, beta: f32, grad_uncond: f32,
    log_hi: f32, log_lo: f32, with_reference: u32, stream: u32,
    with_direction: u32, quadratic: f32, loss_weight: f32,
}

@group(0) @binding(0) var<uniform> params: Params;

// Threads of a workgroup, and the elements of one sample that it takes: THREADS and BLOCK in src/ops/mod.rs.
const THREADS: u32 = 64u;
const BLOCK: u32 = 4096u;

// Sums over a sample are deterministic: every thread leaves the sum of its elements, and a second kernel adds these up in
// order. Without barriers, which cost software Vulkan more than the arithmetic between them.
fn partial_index(group: vec3<u32>, thread: u32) -> u32 {
    return (group.y * params.blocks + group.x) * THREADS + thread;
}
