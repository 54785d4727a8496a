// The end of log_ratio: partial sums to means over the dimensions. One workgroup a sample.

// partials are [batch, blocks, threads].
@group(0) @binding(1) var<storage, read_write> partials: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> log_rho: array<vec2<f32>>;  // [batch]: log rho, KL

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sum = partials_sum(group.x, thread);
    if thread == 0u { log_rho[group.x] = vec2<f32>(-sum.x, sum.y) / f32(params.dim); }
}
