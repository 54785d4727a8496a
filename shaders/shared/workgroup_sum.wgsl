// The sum over a workgroup of 256 threads, which all of them get: in a fixed order, in two levels
// of 16. Call it from uniform control flow.

var<workgroup> partials: array<vec2<f32>, 256>;
var<workgroup> sixteenths: array<vec2<f32>, 16>;

fn workgroup_sum(thread: u32, own: vec2<f32>) -> vec2<f32> {
    // Whoever reads the last sum's sixteenths has passed the first barrier before these change.
    partials[thread] = own;
    workgroupBarrier();
    if thread < 16u {
        var sum = vec2<f32>();
        for (var i = 0u; i < 16u; i += 1u) { sum += partials[thread * 16u + i]; }
        sixteenths[thread] = sum;
    }
    workgroupBarrier();
    var total = vec2<f32>();
    for (var i = 0u; i < 16u; i += 1u) { total += sixteenths[i]; }
    return total;
}
