// The gradient of attention's output, which both gradients read.

@group(0) @binding(5) var<storage, read_write> g: array<Lanes>;   // [batch, queries, heads, HEAD]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;   // [batch, heads, queries]
@group(0) @binding(7) var<storage, read_write> delta: array<f32>; // [batch, heads, queries]
