// The second half of a sum over a sample: what the threads of its blocks left, added up by one
// workgroup in a fixed order. The first thread holds the sum.

var<workgroup> sums: array<vec2<f32>, THREADS>;

fn partials_sum(sample: u32, thread: u32) -> vec2<f32> {
    var sum = vec2<f32>();
    for (var block = 0u; block < params.blocks; block += 1u) {
        sum += partials[(sample * params.blocks + block) * THREADS + thread];
    }
    sums[thread] = sum;
    workgroupBarrier();
    var total = vec2<f32>();
    if thread == 0u {
        for (var i = 0u; i < THREADS; i += 1u) { total += sums[i]; }
    }
    return total;
}
