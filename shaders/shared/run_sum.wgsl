// Sums over runs of 8 threads of a workgroup of 64, in a fixed order; a run takes a row, eight
// neighbours of it at a time: whole cache lines for a GPU, one vector for a processor. Call it from
// uniform control flow.

const RUN: u32 = 8u;

var<workgroup> run_parts: array<vec2<f32>, 64>;

fn run_sum(thread: u32, own: vec2<f32>) -> vec2<f32> {
    workgroupBarrier(); // for those who still read the last sum's parts
    run_parts[thread] = own;
    workgroupBarrier();
    let start = thread - thread % RUN;
    var sum = vec2<f32>();
    for (var i = 0u; i < RUN; i += 1u) { sum += run_parts[start + i]; }
    return sum;
}
