// Philox noise as a tensor: initial latents, and the test of the generator itself. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> noise: array<Lanes>; // [batch, dim]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sample = group.y;
    let units = params.dim / WIDTH;
    let end = min((group.x + 1u) * (BLOCK / WIDTH), units);
    for (var unit = group.x * (BLOCK / WIDTH) + thread; unit < end; unit += THREADS) {
        noise[sample * units + unit] = draw(sample, unit);
    }
}
