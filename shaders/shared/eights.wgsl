// For devices whose subgroups are eight wide and whose shaders a CPU runs: software Vulkan. There a
// read is a loop over the subgroup, dozens of times what a product costs, while handing a number
// from one thread of a subgroup to all is cheap. So nothing goes through workgroup memory: each
// subgroup computes by itself, a thread reads what all of it use, and rows are eight at a time.

alias Sums = array<vec4<f32>, 8>;

// Adds one channel: `left` is a thread's row of each eight.
fn add(sums: ptr<function, Sums>, left: f32, right: vec4<f32>) {
    (*sums)[0] = fma(vec4<f32>(subgroupBroadcast(left, 0u)), right, (*sums)[0]);
    (*sums)[1] = fma(vec4<f32>(subgroupBroadcast(left, 1u)), right, (*sums)[1]);
    (*sums)[2] = fma(vec4<f32>(subgroupBroadcast(left, 2u)), right, (*sums)[2]);
    (*sums)[3] = fma(vec4<f32>(subgroupBroadcast(left, 3u)), right, (*sums)[3]);
    (*sums)[4] = fma(vec4<f32>(subgroupBroadcast(left, 4u)), right, (*sums)[4]);
    (*sums)[5] = fma(vec4<f32>(subgroupBroadcast(left, 5u)), right, (*sums)[5]);
    (*sums)[6] = fma(vec4<f32>(subgroupBroadcast(left, 6u)), right, (*sums)[6]);
    (*sums)[7] = fma(vec4<f32>(subgroupBroadcast(left, 7u)), right, (*sums)[7]);
}
