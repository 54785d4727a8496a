// The second half of a sum over a sample: what the threads of its blocks left, in order. Four sums side by side, since a
// single chain of additions would wait for each.

fn partials_sum(sample: u32) -> vec2<f32> {
    let count = params.blocks * THREADS;
    let start = sample * count;
    var sums = array<vec2<f32>, 4>();
    for (var i = start; i < start + count; i += 4u) {
        sums[0] += partials[i];
        sums[1] += partials[i + 1u];
        sums[2] += partials[i + 2u];
        sums[3] += partials[i + 3u];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
