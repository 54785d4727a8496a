// The gradient of attention's output, which both gradients read. Follows attention_tile.wgsl.

@group(0) @binding(5) var<storage, read_write> g: array<Lanes>;   // [batch, queries, heads, HEAD]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;   // [batch, heads, queries]
@group(0) @binding(7) var<storage, read_write> delta: array<f32>; // [batch, heads, queries]

fn gradient_unit(rows: Rows, first: u32, chunk: u32, i: u32) -> Lanes {
    if !held(rows, first, chunk, i) { return Lanes(); }
    return g[source(rows, first, chunk, i)];
}
