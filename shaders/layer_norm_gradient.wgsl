// The gradient of layer_norm with respect to x; gamma and beta are frozen. With h = g gamma and n
// the normalised x: gx = rstd (h - mean(h) - n mean(h n)). Grid: folded blocks of 8 rows.

struct Sizes { rows: u32, width: u32, rows_per_gamma: u32, epsilon: f32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;     // [rows, width]
@group(0) @binding(2) var<storage, read_write> g: array<Lanes>;     // [rows, width]
@group(0) @binding(3) var<storage, read_write> gamma: array<Lanes>; // [r, width]
@group(0) @binding(4) var<storage, read_write> statistics: array<vec2<f32>>; // [rows]: mean, rstd
@group(0) @binding(5) var<storage, read_write> gx: array<Lanes>;    // [rows, width]

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
    let mean = statistics[row].x;
    let rstd = statistics[row].y;

    var sums = vec2<f32>();
    for (var u = lane; u < units; u += RUN) {
        let n = (x[start + u] - mean) * rstd;
        let h = g[start + u] * gamma[gamma_start + u];
        sums = vec2<f32>(sums.x + sum_lanes(h), dot_add(h, n, sums.y));
    }
    let means = run_sum(thread, sums) / f32(sizes.width);
    if own >= sizes.rows { return; }
    for (var u = lane; u < units; u += RUN) {
        let n = (x[start + u] - mean) * rstd;
        let h = g[start + u] * gamma[gamma_start + u];
        gx[start + u] = rstd * (h - means.x - n * means.y);
    }
}
