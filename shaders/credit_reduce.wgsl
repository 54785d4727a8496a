// Statistics of each step over its samples: one workgroup a step, fixed tree. The weights turn |d loss / d log rho|
// into the step's contribution to the gradient of the prediction.

struct Sizes { steps: u32, samples: u32, pad0: u32, pad1: u32 }

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> stats: array<f32>;   // [steps, samples, 6]
@group(0) @binding(2) var<storage, read_write> weights: array<f32>; // [steps]
@group(0) @binding(3) var<storage, read_write> table: array<f32>;   // [steps, 7]

var<workgroup> tree: array<f32, 256>;

fn tree_sum(thread: u32, value: f32) -> f32 {
    workgroupBarrier();
    tree[thread] = value;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half = half / 2u) {
        if thread < half { tree[thread] += tree[thread + half]; }
        workgroupBarrier();
    }
    return tree[0];
}

fn column_mean(thread: u32, step: u32, column: u32) -> f32 {
    var sum = 0.0;
    for (var i = thread; i < sizes.samples; i += 256u) { sum += stats[(step * sizes.samples + i) * 6u + column]; }
    return tree_sum(thread, sum) / f32(sizes.samples);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let step = group.x;
    let mean = column_mean(thread, step, 0u);
    // Two passes: the variance of numbers near 1e-5 around a mean near 1e-4 would cancel in one.
    var squares = 0.0;
    for (var i = thread; i < sizes.samples; i += 256u) {
        let d = stats[(step * sizes.samples + i) * 6u] - mean;
        squares += d * d;
    }
    let variance = tree_sum(thread, squares) / f32(sizes.samples);
    let loss = column_mean(thread, step, 1u);
    let clipped = column_mean(thread, step, 2u);
    let approx_kl = column_mean(thread, step, 3u);
    let kl = column_mean(thread, step, 4u);
    let push = column_mean(thread, step, 5u);
    if thread == 0u {
        let row = 7u * step;
        table[row] = mean;
        table[row + 1u] = sqrt(variance);
        table[row + 2u] = loss;
        table[row + 3u] = clipped;
        table[row + 4u] = approx_kl;
        table[row + 5u] = kl;
        table[row + 6u] = push * weights[step];
    }
}
