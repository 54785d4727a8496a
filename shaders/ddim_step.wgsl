// One DDIM step: guidance, mean = a x - b p, noise, x_prev, and the partial sums of log p. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> x: array<f32>;          // [batch, dim]
@group(0) @binding(2) var<storage, read_write> model_out: array<f32>;  // [(1 + guided) batch, dim]
@group(0) @binding(3) var<storage, read_write> x_prev: array<f32>;     // [batch, dim]
@group(0) @binding(4) var<storage, read_write> prediction: array<f32>; // [batch, dim]
@group(0) @binding(5) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks]

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sample = group.y;
    let end = min((group.x + 1u) * BLOCK, params.dim);
    var squares = 0.0;
    for (var first = group.x * BLOCK + 4u * thread; first < end; first += 4u * THREADS) {
        var z = vec4<f32>();
        if params.sigma > 0.0 {
            z = normals(vec2<u32>(params.key_lo, params.key_hi), params.stream, params.first_image + sample, params.step, first / 4u);
        }
        for (var lane = 0u; lane < min(4u, end - first); lane++) {
            let i = sample * params.dim + first + lane;
            var p = model_out[i];
            if params.guided == 1u {
                p = p + params.guidance * (model_out[i + params.batch * params.dim] - p);
            }
            var mean = params.a * x[i] - params.b * p;
            if params.clip < 1e30 {
                let x0 = params.x0_x * x[i] - params.x0_p * p;
                mean += params.root_prev * (clamp(x0, -params.clip, params.clip) - x0);
            }
            prediction[i] = p;
            x_prev[i] = mean + params.sigma * z[lane];
            // x_prev - mean is sigma z by construction: no difference of nearly equal numbers is taken.
            squares += z[lane] * z[lane];
        }
    }
    let sum = tree_sum(thread, vec2<f32>(squares, 0.0));
    if thread == 0u { partials[sample * params.blocks + group.x] = sum; }
}
