// How attention_tile.wgsl reads attention_given.wgsl.

fn gradient_unit(rows: Rows, first: u32, chunk: u32, i: u32) -> Lanes {
    if !held(rows, first, chunk, i) { return Lanes(); }
    return g[source(rows, first, chunk, i)];
}
