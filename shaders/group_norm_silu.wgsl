// silu(normalised x * gamma + beta) over groups of channels; without silu where it is off. One
// workgroup a group of an image: its numbers depend on that image alone. Grid: (groups, batch).

// channels: of all groups. Lanes are as wide as divides a group's channels.
struct Sizes {
    pixels: u32, channels: u32, groups: u32, silu: u32,
    epsilon: f32, pad0: u32, pad1: u32, pad2: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> x: array<Lanes>;     // [batch, pixels, channels]
@group(0) @binding(2) var<storage, read_write> gamma: array<Lanes>; // [channels]
@group(0) @binding(3) var<storage, read_write> beta: array<Lanes>;  // [channels]
@group(0) @binding(4) var<storage, read_write> y: array<Lanes>;     // [batch, pixels, channels]
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>; // [batch, groups]

// statistics are mean and 1 / deviation.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pixels = sizes.pixels;
    let silu = sizes.silu == 1u;
    let units = sizes.channels / WIDTH;     // of a pixel
    let channels = units / sizes.groups;    // of a group
    let gamma_start = group.x * channels;
    let start = group.y * pixels * units + gamma_start;
    let n = f32(pixels) * f32(channels * WIDTH);
    let step = walk_start(THREADS, channels);
    let own = walk_start(thread, channels);

    // Around the group's first number: where the mean is large beside the deviation, sums of the
    // numbers themselves, and even the mean as one f32, would lose what is left of them.
    let origin = first_lane(x[start]);
    var sum = 0.0;
    for (var at = own; at.pixel < pixels; at = walk_on(at, step, channels)) {
        sum += sum_lanes(x[start + at.pixel * units + at.channel] - origin);
    }
    let mean = workgroup_sum(thread, vec2<f32>(sum, 0.0)).x / n;
    var square = 0.0;
    for (var at = own; at.pixel < pixels; at = walk_on(at, step, channels)) {
        let d = (x[start + at.pixel * units + at.channel] - origin) - mean;
        square = dot_add(d, d, square);
    }
    let variance = workgroup_sum(thread, vec2<f32>(square, 0.0)).x / n;
    let rstd = 1.0 / sqrt(variance + sizes.epsilon);
    if thread == 0u {
        statistics[group.y * sizes.groups + group.x] = vec2<f32>(origin + mean, rstd);
    }

    for (var at = own; at.pixel < pixels; at = walk_on(at, step, channels)) {
        let i = start + at.pixel * units + at.channel;
        let c = gamma_start + at.channel;
        var z = ((x[i] - origin) - mean) * rstd * gamma[c] + beta[c];
        if silu { z *= sigmoid(z); }
        y[i] = z;
    }
}
