// What attention and its gradients are given, by tiles and where subgroups are eight wide alike.

// splits: of attention_gradient_kv alone, 1 elsewhere.
struct Sizes {
    queries: u32, keys: u32, heads: u32, has_bias: u32,
    // Strides of bias over images and heads in numbers; 0 where one serves all.
    bias_batch: u32, bias_head: u32, scale: f32, splits: u32,
    batch: u32,
    // Workgroups of the launches before.
    first: u32, pad0: u32, pad1: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> q: array<Lanes>;   // [batch, queries, heads, HEAD]
@group(0) @binding(2) var<storage, read_write> k: array<Lanes>;   // [batch, keys, heads, HEAD]
@group(0) @binding(3) var<storage, read_write> v: array<Lanes>;   // [batch, keys, heads, HEAD]
@group(0) @binding(4) var<storage, read_write> bias: array<f32>;  // [.., .., queries, keys], or any
