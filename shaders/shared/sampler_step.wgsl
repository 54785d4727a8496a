// The body of ddim_step and flow_step: guidance, the sampler's own mean (step_mean), noise, x_prev,
// and the partial sums of log p, all in one pass. Grid: (blocks, batch).

// [rows, dim] is [(1 + guided) batch, dim], the unconditional rows first where there is guidance.
// partials are [batch, blocks, threads]: of z^2, and nothing.
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;          // [batch, dim]
@group(0) @binding(2) var<storage, read_write> model_out: array<Lanes>; // [rows, dim]
@group(0) @binding(3) var<storage, read_write> x_prev: array<Lanes>;     // [batch, dim]
@group(0) @binding(4) var<storage, read_write> prediction: array<Lanes>; // [batch, dim]
@group(0) @binding(5) var<storage, read_write> partials: array<vec2<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sample = group.y;
    let first = first_unit(group, thread);
    let end = end_unit(first);
    var squares = 0.0;
    for (var unit = first; unit < end; unit += RUN) {
        var z = Lanes();
        if params.sigma > 0.0 { z = draw(sample, unit); }
        let i = sample * units() + unit;
        let j = i + params.batch * units();
        var p = model_out[i];
        if params.guided == 1u { p = p + params.guidance * (model_out[j] - p); }
        prediction[i] = p;
        x_prev[i] = step_mean(x[i], p) + params.sigma * z;
        // x_prev - mean is sigma z by construction: no difference of nearly equal numbers is taken.
        squares += sum_lanes(z * z);
    }
    partials[partial_index(group, thread)] = vec2<f32>(squares, 0.0);
}
