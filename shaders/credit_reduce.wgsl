// Statistics of each step over its samples: one workgroup a step, sums in a fixed order. The
// weights turn |d loss / d log rho| into the step's contribution to the gradient of the prediction.

struct Sizes { steps: u32, samples: u32, pad0: u32, pad1: u32 }

// Kept in sync with SampleStats in src/ops/policy_objective.rs, StepStats in
// src/ops/credit_reduce.rs.
struct SampleStats { log_rho: f32, loss: f32, clipped: f32, approx_kl: f32, kl: f32, push: f32 }
struct StepStats {
    log_rho_mean: f32, log_rho_std: f32, loss: f32, clip_frac: f32, approx_kl: f32, kl: f32,
    contribution: f32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> stats: array<SampleStats>; // [steps, samples]
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;       // [steps]
@group(0) @binding(3) var<storage, read_write> table: array<StepStats>;   // [steps]

const GROUP: u32 = 64u;

var<workgroup> sums: array<SampleStats, 64>;
var<workgroup> squares: array<f32, 64>;
var<workgroup> means: SampleStats;

fn add(a: SampleStats, b: SampleStats) -> SampleStats {
    return SampleStats(
        a.log_rho + b.log_rho, a.loss + b.loss, a.clipped + b.clipped,
        a.approx_kl + b.approx_kl, a.kl + b.kl, a.push + b.push,
    );
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let step = group.x;
    let start = step * sizes.samples;
    let n = f32(sizes.samples);
    var own = SampleStats();
    for (var i = thread; i < sizes.samples; i += GROUP) { own = add(own, stats[start + i]); }
    sums[thread] = own;
    workgroupBarrier();
    if thread == 0u {
        var t = SampleStats();
        for (var i = 0u; i < GROUP; i += 1u) { t = add(t, sums[i]); }
        means = SampleStats(
            t.log_rho / n, t.loss / n, t.clipped / n, t.approx_kl / n, t.kl / n, t.push / n,
        );
    }
    workgroupBarrier();
    // Two passes: the variance of numbers near 1e-5 around a mean near 1e-4 would cancel in one.
    var square = 0.0;
    for (var i = thread; i < sizes.samples; i += GROUP) {
        let d = stats[start + i].log_rho - means.log_rho;
        square += d * d;
    }
    squares[thread] = square;
    workgroupBarrier();
    if thread == 0u {
        var total = 0.0;
        for (var i = 0u; i < GROUP; i += 1u) { total += squares[i]; }
        table[step] = StepStats(
            means.log_rho,
            sqrt(total / n),
            means.loss,
            means.clipped,
            means.approx_kl,
            means.kl,
            means.push * weights[step],
        );
    }
}
