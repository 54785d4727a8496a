// Queries outside, keys and values inside: attention and its queries' gradient. Follows
// attention_tile.wgsl.

fn load_queries(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        outer_tile[place(i)] = hold(query_unit(rows, first, chunk, i));
    }
}
fn load_keys(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        inner_tile[place(i)] = hold(key_unit(rows, first, chunk, i));
    }
}
fn load_values(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        inner_tile[place(i)] = hold(value_unit(rows, first, chunk, i));
    }
}
