// From log rho, advantage and credit weight: the loss, its statistics, and its gradient with respect to the network's
// output. Grid: (blocks, batch); follows log_ratio. Objectives: 0 PPO-clip, 1 log-ratio, 2 log-hinge (METHOD section 4).

@group(0) @binding(1) var<storage, read_write> model_out: array<Lanes>;  // [(1 + guided) batch, dim]
@group(0) @binding(2) var<storage, read_write> reference: array<Lanes>;  // [(1 + guided) batch, dim], or any buffer
@group(0) @binding(3) var<storage, read_write> log_rho: array<vec2<f32>>; // [batch]: log rho, KL
@group(0) @binding(4) var<storage, read_write> advantage: array<f32>;  // [batch]
@group(0) @binding(5) var<storage, read_write> gradient: array<Lanes>;   // [(1 + guided) batch, dim]; holds log_ratio's direction in its first rows
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;      // [batch, 6]

// (loss, d loss / d log rho, clipped)
fn objective(lr: f32, adv: f32) -> vec3<f32> {
    let xi = params.xi;
    if params.objective == 2u {
        let h = xi * abs(adv) - adv * lr;
        return vec3<f32>(max(h, 0.0), select(0.0, -adv, h > 0.0), select(0.0, 1.0, h < 0.0));
    }
    let ppo = params.objective == 0u;
    let above = lr > params.log_hi;
    let below = lr < params.log_lo;
    let clipped = select(0.0, 1.0, above || below);
    if adv > 0.0 && above { return vec3<f32>(-adv * (1.0 + xi), 0.0, clipped); }
    if adv < 0.0 && below { return vec3<f32>(-adv * (1.0 - xi), 0.0, clipped); }
    if ppo {
        let rho = exp(lr);
        return vec3<f32>(-adv * rho, -adv * rho, clipped);
    }
    return vec3<f32>(-adv * (1.0 + lr), -adv, clipped);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    params = uniforms;
    let sample = group.y;
    let lr = log_rho[sample];
    let o = objective(lr.x, advantage[sample]);
    let policy = -o.y * params.loss_weight * params.scale / f32(params.dim);
    let penalty = params.beta * params.scale * params.w_native * params.w_native / f32(params.dim);
    let first = first_unit(group, thread);
    let end = end_unit(first);
    for (var unit = first; unit < end; unit += RUN) {
        let i = sample * units() + unit;
        let j = i + params.batch * units();
        var g = policy * gradient[i];
        if params.with_reference == 1u {
            var d = model_out[i] - reference[i];
            if params.guided == 1u { d = d + params.guidance * ((model_out[j] - reference[j]) - d); }
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
        let row = 6u * sample;
        stats[row] = lr.x;
        stats[row + 1u] = params.loss_weight * o.x + params.beta * lr.y;
        stats[row + 2u] = o.z;
        stats[row + 3u] = 0.5 * lr.x * lr.x;
        stats[row + 4u] = lr.y;
        stats[row + 5u] = params.loss_weight * abs(o.y);
    }
}
