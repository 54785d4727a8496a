// The gradient of rms_norm with respect to x; gamma is frozen. With h = g gamma and n = x r, r the
// reciprocal of the root: gx = r (h - n mean(h n)). Grid: folded blocks of 8 rows.

struct Sizes { rows: u32, width: u32, rows_per_gamma: u32, epsilon: f32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;         // [rows, width]
@group(0) @binding(2) var<storage, read_write> g: array<Lanes>;         // [rows, width]
@group(0) @binding(3) var<storage, read_write> gamma: array<Lanes>;     // [r, width]
@group(0) @binding(4) var<storage, read_write> reciprocals: array<f32>; // [rows]: 1 / root
@group(0) @binding(5) var<storage, read_write> gx: array<Lanes>;        // [rows, width]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let lane = thread % RUN;
    // The threads beyond the last row take it once more and store nothing: barriers need them.
    let own = (group.y * groups.x + group.x) * RUN + thread / RUN;
    let row = min(own, sizes.rows - 1u);
    let units = sizes.width / WIDTH;
    let start = row * units;
    let gamma_start = row / sizes.rows_per_gamma * units;
    let r = reciprocals[row];

    var along = 0.0;
    for (var u = lane; u < units; u += RUN) {
        along = dot_add(g[start + u] * gamma[gamma_start + u], x[start + u] * r, along);
    }
    let mean = run_sum(thread, vec2<f32>(along, 0.0)).x / f32(sizes.width);
    if own >= sizes.rows { return; }
    for (var u = lane; u < units; u += RUN) {
        let h = g[start + u] * gamma[gamma_start + u];
        gx[start + u] = r * (h - x[start + u] * r * mean);
    }
}
