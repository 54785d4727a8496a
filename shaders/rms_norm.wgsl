// Root-mean-square norm of rows: x / sqrt(mean(x^2) + epsilon) * gamma[r], where row i of x has
// r = i / rows_per_gamma: one r in all is the usual norm, one an image a modulation.
// Grid: folded blocks of 8 rows.

struct Sizes { rows: u32, width: u32, rows_per_gamma: u32, epsilon: f32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;         // [rows, width]
@group(0) @binding(2) var<storage, read_write> gamma: array<Lanes>;     // [r, width]
@group(0) @binding(3) var<storage, read_write> y: array<Lanes>;         // [rows, width]
@group(0) @binding(4) var<storage, read_write> reciprocals: array<f32>; // [rows]: 1 / root

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

    var square = 0.0;
    for (var u = lane; u < units; u += RUN) {
        square = dot_add(x[start + u], x[start + u], square);
    }
    let sum = run_sum(thread, vec2<f32>(square, 0.0)).x;
    let r = 1.0 / sqrt(sum / f32(sizes.width) + sizes.epsilon);
    if own >= sizes.rows { return; }
    if lane == 0u { reciprocals[row] = r; }
    let gamma_start = row / sizes.rows_per_gamma * units;
    for (var u = lane; u < units; u += RUN) {
        y[start + u] = x[start + u] * r * gamma[gamma_start + u];
    }
}
