// y = activation(x), elementwise.

struct Sizes { units: u32, kind: u32, pad0: u32, pad1: u32 } // units of Lanes

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;
@group(0) @binding(2) var<storage, read_write> y: array<Lanes>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let kind = sizes.kind;
    let first = first_unit(group, groups, thread);
    let end = end_unit(first, sizes.units);
    for (var i = first; i < end; i += RUN) { y[i] = activation(kind, x[i]); }
}
