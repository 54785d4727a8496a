// delta = sum over a head of g out, which attention's gradients subtract: one thread a (row, head).
// Grid: folded blocks of 64.

struct Sizes { rows: u32, queries: u32, heads: u32, width: u32 } // rows: batch x queries x heads

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> g: array<Lanes>;   // [batch, queries, heads, width]
@group(0) @binding(2) var<storage, read_write> out: array<Lanes>; // [batch, queries, heads, width]
@group(0) @binding(3) var<storage, read_write> delta: array<f32>; // [batch, heads, queries]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = (group.y * groups.x + group.x) * 64u + thread;
    if row >= sizes.rows { return; }
    let units = sizes.width / WIDTH;
    var sum = 0.0;
    for (var u = 0u; u < units; u += 1u) {
        sum = dot_add(g[row * units + u], out[row * units + u], sum);
    }
    let head = row % sizes.heads;
    let query = row / sizes.heads % sizes.queries;
    let image = row / sizes.heads / sizes.queries;
    delta[(image * sizes.heads + head) * sizes.queries + query] = sum;
}
