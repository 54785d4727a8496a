// The gradient of geglu with respect to all of h.

struct Sizes { rows: u32, inner: u32, pad0: u32, pad1: u32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> h: array<Lanes>;  // [rows, 2, inner]
@group(0) @binding(2) var<storage, read_write> g: array<Lanes>;  // [rows, inner]
@group(0) @binding(3) var<storage, read_write> gh: array<Lanes>; // [rows, 2, inner]

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
        let gate = h[value + inner];
        let n = normal(gate);
        gh[value] = g[i] * (gate * n.below);
        gh[value + inner] = g[i] * h[value] * (n.below + gate * (n.bell * INVERSE_ROOT_TAU));
    }
}
