// From log rho, advantage and credit weight: the loss, its statistics, and its gradient with
// respect to the network's output. Grid: (blocks, batch); follows log_ratio. `objective` comes from
// a file of shaders/objectives, one a kernel (docs/METHOD.md, section 4).

// [rows, dim] is [(1 + guided) batch, dim], the unconditional rows first where there is guidance.
// gradient holds log_ratio's direction in its first rows.
@group(0) @binding(1) var<storage, read_write> model_out: array<Lanes>; // [rows, dim]
@group(0) @binding(2) var<storage, read_write> base: array<Lanes>;      // [rows, dim], or any
@group(0) @binding(3) var<storage, read_write> log_rho: array<vec2<f32>>; // [batch]: log rho, KL
@group(0) @binding(4) var<storage, read_write> advantage: array<f32>;    // [batch]
@group(0) @binding(5) var<storage, read_write> gradient: array<Lanes>;  // [rows, dim]
@group(0) @binding(6) var<storage, read_write> stats: array<SampleStats>; // [batch]

// Kept in sync with SampleStats in src/ops/policy_objective.rs.
struct SampleStats { log_rho: f32, loss: f32, clipped: f32, approx_kl: f32, kl: f32, push: f32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sample = group.y;
    let lr = log_rho[sample];
    let o = objective(lr.x, advantage[sample]);
    let policy = -o.slope * params.loss_weight * params.scale / f32(params.dim);
    let penalty = params.beta * params.scale * params.w_native * params.w_native / f32(params.dim);
    let first = first_unit(group, thread);
    let end = end_unit(first);
    for (var unit = first; unit < end; unit += RUN) {
        let i = sample * units() + unit;
        let j = i + params.batch * units();
        var g = policy * gradient[i];
        if params.with_base == 1u {
            var d = model_out[i] - base[i];
            if params.guided == 1u { d = d + params.guidance * ((model_out[j] - base[j]) - d); }
            g += penalty * d;
        }
        if params.guided == 1u {
            gradient[i] = params.grad_uncond * (1.0 - params.guidance) * g;
            gradient[j] = params.guidance * g;
        } else {
            gradient[i] = g;
        }
    }
    if group.x == 0u && thread == 0u {
        stats[sample] = SampleStats(
            lr.x,
            params.loss_weight * o.loss + params.beta * lr.y,
            o.clipped,
            0.5 * lr.x * lr.x,
            lr.y,
            params.loss_weight * abs(o.slope),
        );
    }
}
