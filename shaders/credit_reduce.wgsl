// Statistics of each step over its samples: one workgroup a step, sums in a fixed order. The weights turn
// |d loss / d log rho| into the step's contribution to the gradient of the prediction.

struct Sizes { steps: u32, samples: u32, pad0: u32, pad1: u32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> stats: array<f32>;   // [steps, samples, 6]
@group(0) @binding(2) var<storage, read_write> weights: array<f32>; // [steps]
@group(0) @binding(3) var<storage, read_write> table: array<f32>;   // [steps, 7]

const GROUP: u32 = 64u;
const COLUMNS: u32 = 6u;

var<workgroup> sums: array<f32, 384>; // [GROUP, COLUMNS]
var<workgroup> means: array<f32, COLUMNS>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let step = group.x;
    let start = step * sizes.samples * COLUMNS;
    var own = array<f32, COLUMNS>();
    for (var i = thread; i < sizes.samples; i += GROUP) {
        for (var c = 0u; c < COLUMNS; c += 1u) { own[c] += stats[start + i * COLUMNS + c]; }
    }
    for (var c = 0u; c < COLUMNS; c += 1u) { sums[thread * COLUMNS + c] = own[c]; }
    workgroupBarrier();
    if thread < COLUMNS {
        var total = 0.0;
        for (var i = 0u; i < GROUP; i += 1u) { total += sums[i * COLUMNS + thread]; }
        means[thread] = total / f32(sizes.samples);
    }
    workgroupBarrier();
    // Two passes: the variance of numbers near 1e-5 around a mean near 1e-4 would cancel in one.
    var squares = 0.0;
    for (var i = thread; i < sizes.samples; i += GROUP) {
        let d = stats[start + i * COLUMNS] - means[0];
        squares += d * d;
    }
    sums[thread] = squares;
    workgroupBarrier();
    if thread == 0u {
        var total = 0.0;
        for (var i = 0u; i < GROUP; i += 1u) { total += sums[i]; }
        let row = 7u * step;
        table[row] = means[0];
        table[row + 1u] = sqrt(total / f32(sizes.samples));
        table[row + 2u] = means[1];
        table[row + 3u] = means[2];
        table[row + 4u] = means[3];
        table[row + 5u] = means[4];
        table[row + 6u] = means[5] * weights[step];
    }
}
