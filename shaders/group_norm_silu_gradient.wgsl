// The gradient of group_norm_silu with respect to x; gamma and beta are frozen. With h the gradient
// of the normalised n: gx = rstd (h - mean(h) - n mean(h n)). Grid: (groups, batch).

// Kept in sync with group_norm_silu.wgsl.
struct Sizes {
    pixels: u32, channels: u32, groups: u32, silu: u32,
    epsilon: f32, pad0: u32, pad1: u32, pad2: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;     // [batch, pixels, channels]
@group(0) @binding(2) var<storage, read_write> g: array<Lanes>;     // [batch, pixels, channels]
@group(0) @binding(3) var<storage, read_write> gamma: array<Lanes>; // [channels]
@group(0) @binding(4) var<storage, read_write> beta: array<Lanes>;  // [channels]
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>; // [batch, groups]
@group(0) @binding(6) var<storage, read_write> gx: array<Lanes>;    // [batch, pixels, channels]

// h of an element whose normalised value is n.
fn normal_gradient(n: Lanes, g: Lanes, gamma: Lanes, beta: Lanes, silu: bool) -> Lanes {
    var h = g * gamma;
    if silu {
        let z = n * gamma + beta;
        let s = sigmoid(z);
        h *= s * (1.0 + z * (1.0 - s));
    }
    return h;
}

// statistics are mean and 1 / deviation.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pixels = sizes.pixels;
    let silu = sizes.silu == 1u;
    let units = sizes.channels / WIDTH;
    let channels = units / sizes.groups;
    let gamma_start = group.x * channels;
    let start = group.y * pixels * units + gamma_start;
    let count = f32(pixels) * f32(channels * WIDTH);
    let step = walk_start(THREADS, channels);
    let own = walk_start(thread, channels);
    let mean = statistics[group.y * sizes.groups + group.x].x;
    let rstd = statistics[group.y * sizes.groups + group.x].y;

    var sums = vec2<f32>();
    for (var at = own; at.pixel < pixels; at = walk_on(at, step, channels)) {
        let i = start + at.pixel * units + at.channel;
        let c = gamma_start + at.channel;
        let n = (x[i] - mean) * rstd;
        let h = normal_gradient(n, g[i], gamma[c], beta[c], silu);
        sums = vec2<f32>(sums.x + sum_lanes(h), dot_add(h, n, sums.y));
    }
    let means = workgroup_sum(thread, sums) / count;
    for (var at = own; at.pixel < pixels; at = walk_on(at, step, channels)) {
        let i = start + at.pixel * units + at.channel;
        let c = gamma_start + at.channel;
        let n = (x[i] - mean) * rstd;
        let h = normal_gradient(n, g[i], gamma[c], beta[c], silu);
        gx[i] = rstd * (h - means.x - n * means.y);
    }
}
