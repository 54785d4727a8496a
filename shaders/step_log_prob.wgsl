// The end of ddim_step and flow_step: partial sums of z^2 to log p, a mean over the dimensions. One
// workgroup a sample.

// partials are [batch, blocks, threads].
@group(0) @binding(1) var<storage, read_write> partials: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> log_prob: array<f32>;       // [batch]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sum = partials_sum(group.x, thread).x;
    if thread == 0u { log_prob[group.x] = -0.5 * sum / f32(params.dim) - params.log_norm; }
}
