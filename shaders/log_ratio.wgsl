// log rho = -mean(w D z + q/2 w^2 D^2) with D = prediction - old, and the exact KL to the base
// policy (docs/METHOD.md, section 3: the form needs neither x_prev nor two log-probabilities). q is
// 1, and 0 for GRPO-Guard's normalised ratio. Grid: (blocks, batch). Where policy_objective
// follows, the direction w (z + q w D) of the gradient is kept, so that noise is drawn once.

// [rows, dim] is [(1 + guided) batch, dim], the unconditional rows first where there is guidance.
// partials are [batch, blocks, threads]: of log rho and of the KL.
@group(0) @binding(1) var<storage, read_write> model_out: array<Lanes>; // [rows, dim]
@group(0) @binding(2) var<storage, read_write> old: array<Lanes>;        // [batch, dim]
@group(0) @binding(3) var<storage, read_write> base: array<Lanes>;      // [rows, dim], or any
@group(0) @binding(4) var<storage, read_write> partials: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> direction: array<Lanes>; // [batch, dim], or any

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sample = group.y;
    let first = first_unit(group, thread);
    let end = end_unit(first);
    var sum = vec2<f32>();
    for (var unit = first; unit < end; unit += RUN) {
        let z = draw(sample, unit);
        let i = sample * units() + unit;
        let j = i + params.batch * units();
        var p = model_out[i];
        if params.guided == 1u { p = p + params.guidance * (model_out[j] - p); }
        let wd = params.w * (p - old[i]);
        let qwd = params.quadratic * wd;
        sum.x += sum_lanes(wd * (z + 0.5 * qwd));
        if params.with_direction == 1u { direction[i] = params.w * (z + qwd); }
        if params.with_base == 1u {
            var b = base[i];
            if params.guided == 1u { b = b + params.guidance * (base[j] - b); }
            let wb = params.w_native * (p - b);
            sum.y += 0.5 * sum_lanes(wb * wb);
        }
    }
    partials[partial_index(group, thread)] = sum;
}
