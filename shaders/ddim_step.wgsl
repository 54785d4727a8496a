// One DDIM step: guidance, mean = a x - b p, noise, x_prev, and the partial sums of log p. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> x: array<f32>;          // [batch, dim]
@group(0) @binding(2) var<storage, read_write> model_out: array<f32>;  // [(1 + guided) batch, dim]
@group(0) @binding(3) var<storage, read_write> x_prev: array<f32>;     // [batch, dim]
@group(0) @binding(4) var<storage, read_write> prediction: array<f32>; // [batch, dim]
@group(0) @binding(5) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks]

// Elements are unrolled by hand: indexing a vector by a variable spills it to memory on software Vulkan.
fn element(i: u32, z: f32) -> f32 {
    var p = model_out[i];
    if params.guided == 1u {
        p = p + params.guidance * (model_out[i + params.batch * params.dim] - p);
    }
    let x_i = x[i];
    var mean = params.a * x_i - params.b * p;
    if params.clip < 1e30 {
        let x0 = params.x0_x * x_i - params.x0_p * p;
        mean += params.root_prev * (clamp(x0, -params.clip, params.clip) - x0);
    }
    prediction[i] = p;
    x_prev[i] = mean + params.sigma * z;
    // x_prev - mean is sigma z by construction: no difference of nearly equal numbers is taken.
    return z * z;
}

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
        let left = end - first;
        let i = sample * params.dim + first;
        squares += element(i, z.x);
        if left > 1u { squares += element(i + 1u, z.y); }
        if left > 2u { squares += element(i + 2u, z.z); }
        if left > 3u { squares += element(i + 3u, z.w); }
    }
    let sum = tree_sum(thread, vec2<f32>(squares, 0.0));
    if thread == 0u { partials[sample * params.blocks + group.x] = sum; }
}
