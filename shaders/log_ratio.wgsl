// log rho = -mean(w D z + 1/2 w^2 D^2) with D = prediction - old, and the exact KL to the reference. The form of
// METHOD section 3 needs neither x_prev nor two log-probabilities. Grid: (blocks, batch).
// Where policy_objective follows, the direction w (z + w D) of the gradient is kept, so that noise is drawn once.

@group(0) @binding(1) var<storage, read_write> model_out: array<f32>;  // [(1 + guided) batch, dim]
@group(0) @binding(2) var<storage, read_write> old: array<f32>;        // [batch, dim]
@group(0) @binding(3) var<storage, read_write> reference: array<f32>;  // [(1 + guided) batch, dim], or any buffer
@group(0) @binding(4) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks]: log rho, KL
@group(0) @binding(5) var<storage, read_write> direction: array<f32>;  // [batch, dim] or longer; or any buffer

// Elements are unrolled by hand: indexing a vector by a variable spills it to memory on software Vulkan.
fn element(i: u32, z: f32) -> vec2<f32> {
    let j = i + params.batch * params.dim;
    var p = model_out[i];
    if params.guided == 1u { p = p + params.guidance * (model_out[j] - p); }
    let wd = params.w * (p - old[i]);
    if params.with_direction == 1u { direction[i] = params.w * (z + wd); }
    var kl = 0.0;
    if params.with_reference == 1u {
        var r = reference[i];
        if params.guided == 1u { r = r + params.guidance * (reference[j] - r); }
        let wr = params.w_native * (p - r);
        kl = 0.5 * wr * wr;
    }
    return vec2<f32>(wd * (z + 0.5 * wd), kl);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sample = group.y;
    let end = min((group.x + 1u) * BLOCK, params.dim);
    var sum = vec2<f32>();
    for (var first = group.x * BLOCK + 4u * thread; first < end; first += 4u * THREADS) {
        let z = normals(vec2<u32>(params.key_lo, params.key_hi), params.stream, params.first_image + sample, params.step, first / 4u);
        let left = end - first;
        let i = sample * params.dim + first;
        sum += element(i, z.x);
        if left > 1u { sum += element(i + 1u, z.y); }
        if left > 2u { sum += element(i + 2u, z.z); }
        if left > 3u { sum += element(i + 3u, z.w); }
    }
    let total = tree_sum(thread, sum);
    if thread == 0u { partials[sample * params.blocks + group.x] = total; }
}
