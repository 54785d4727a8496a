// Philox noise as a tensor: initial latents, and the test of the generator itself. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> noise: array<f32>; // [batch, dim]

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sample = group.y;
    let end = min((group.x + 1u) * BLOCK, params.dim);
    for (var first = group.x * BLOCK + 4u * thread; first < end; first += 4u * THREADS) {
        let z = normals(vec2<u32>(params.key_lo, params.key_hi), params.stream, params.first_image + sample, params.step, first / 4u);
        let left = end - first;
        let i = sample * params.dim + first;
        noise[i] = z.x;
        if left > 1u { noise[i + 1u] = z.y; }
        if left > 2u { noise[i + 2u] = z.z; }
        if left > 3u { noise[i + 3u] = z.w; }
    }
}
