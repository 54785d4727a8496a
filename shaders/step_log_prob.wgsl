// The end of ddim_step and flow_step: partial sums of z^2 to log p, a mean over the dimensions. One thread a sample.

@group(0) @binding(1) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks, threads]
@group(0) @binding(2) var<storage, read_write> log_prob: array<f32>;       // [batch]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.batch { return; }
    let sum = partials_sum(id.x).x;
    log_prob[id.x] = -0.5 * sum / f32(params.dim) - params.log_norm;
}
