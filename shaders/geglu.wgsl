// y = value * gelu(gate), where a row of h is its values and then its gates.

struct Sizes { rows: u32, inner: u32, pad0: u32, pad1: u32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> h: array<Lanes>; // [rows, 2, inner]
@group(0) @binding(2) var<storage, read_write> y: array<Lanes>; // [rows, inner]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let inner = sizes.inner / WIDTH;
    let first = first_unit(group, groups, thread);
    let end = end_unit(first, sizes.rows * inner);
    for (var i = first; i < end; i += RUN) {
        let value = i + i / inner * inner;
        y[i] = h[value] * gelu(h[value + inner]);
    }
}
