// Layer norm of rows: normalised x * gamma[r] + beta[r], where row i of x has
// r = i / rows_per_gamma: one r in all is the usual affine layer norm, one an image a modulation.
// Grid: folded blocks of 8 rows.

struct Sizes { rows: u32, width: u32, rows_per_gamma: u32, epsilon: f32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;     // [rows, width]
@group(0) @binding(2) var<storage, read_write> gamma: array<Lanes>; // [r, width]
@group(0) @binding(3) var<storage, read_write> beta: array<Lanes>;  // [r, width]
@group(0) @binding(4) var<storage, read_write> y: array<Lanes>;     // [rows, width]
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>; // [rows]: mean, rstd

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
    let n = f32(sizes.width);

    // Around the row's first number: where the mean is large beside the deviation, sums of the
    // numbers themselves, and even the mean as one f32, would lose what is left of them.
    let origin = first_lane(x[start]);
    var sum = 0.0;
    for (var u = lane; u < units; u += RUN) { sum += sum_lanes(x[start + u] - origin); }
    let mean = run_sum(thread, vec2<f32>(sum, 0.0)).x / n;
    var square = 0.0;
    for (var u = lane; u < units; u += RUN) {
        let d = (x[start + u] - origin) - mean;
        square = dot_add(d, d, square);
    }
    let rstd = 1.0 / sqrt(run_sum(thread, vec2<f32>(square, 0.0)).x / n + sizes.epsilon);
    if own >= sizes.rows { return; }
    if lane == 0u { statistics[row] = vec2<f32>(origin + mean, rstd); }
    let gamma_start = row / sizes.rows_per_gamma * units;
    for (var u = lane; u < units; u += RUN) {
        let normal = ((x[start + u] - origin) - mean) * rstd;
        y[start + u] = normal * gamma[gamma_start + u] + beta[gamma_start + u];
    }
}
