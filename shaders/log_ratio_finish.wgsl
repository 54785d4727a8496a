// The end of log_ratio: partial sums to means over the dimensions. One thread a sample.

@group(0) @binding(1) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks, threads]
@group(0) @binding(2) var<storage, read_write> log_rho: array<vec2<f32>>;  // [batch]: log rho, KL

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.batch { return; }
    let sum = partials_sum(id.x);
    log_rho[id.x] = vec2<f32>(-sum.x, sum.y) / f32(params.dim);
}
