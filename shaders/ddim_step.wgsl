// One DDIM step: guidance, mean = a x - b p, noise, x_prev, and the partial sums of log p. Grid: (blocks, batch).

@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;          // [batch, dim]
@group(0) @binding(2) var<storage, read_write> model_out: array<Lanes>;  // [(1 + guided) batch, dim]
@group(0) @binding(3) var<storage, read_write> x_prev: array<Lanes>;     // [batch, dim]
@group(0) @binding(4) var<storage, read_write> prediction: array<Lanes>; // [batch, dim]
@group(0) @binding(5) var<storage, read_write> partials: array<vec2<f32>>; // [batch, blocks]

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sample = group.y;
    let units = params.dim / WIDTH;
    let end = min((group.x + 1u) * (BLOCK / WIDTH), units);
    var squares = 0.0;
    for (var unit = group.x * (BLOCK / WIDTH) + thread; unit < end; unit += THREADS) {
        var z = Lanes();
        if params.sigma > 0.0 { z = draw(sample, unit); }
        let i = sample * units + unit;
        let j = i + params.batch * units;
        var p = model_out[i];
        if params.guided == 1u { p = p + params.guidance * (model_out[j] - p); }
        let x_i = x[i];
        var mean = params.a * x_i - params.b * p;
        if params.clip < 1e30 {
            let x0 = params.x0_x * x_i - params.x0_p * p;
            mean += params.root_prev * (clamp(x0, Lanes(-params.clip), Lanes(params.clip)) - x0);
        }
        prediction[i] = p;
        x_prev[i] = mean + params.sigma * z;
        // x_prev - mean is sigma z by construction: no difference of nearly equal numbers is taken.
        squares += sum_lanes(z * z);
    }
    let sum = tree_sum(thread, vec2<f32>(squares, 0.0));
    if thread == 0u { partials[sample * params.blocks + group.x] = sum; }
}
