// Philox noise as a tensor, for dumps, the bench and the generator's test. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> noise: array<Lanes>; // [batch, dim]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sample = group.y;
    let first = first_unit(group, thread);
    let end = end_unit(first);
    for (var unit = first; unit < end; unit += RUN) {
        noise[sample * units() + unit] = draw(sample, unit);
    }
}
