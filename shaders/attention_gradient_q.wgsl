// The queries' gradient of attention: ds = p (dp - delta) with p = exp(s - lse) made anew and
// dp = g v^T; gq = scale ds k. Grid: batch x heads x SLICES x blocks of 32 queries, folded.

// Bindings 0 to 7 are in shared/attention_bindings.wgsl and shared/attention_given.wgsl.
@group(0) @binding(8) var<storage, read_write> gq: array<f32>;    // [batch, queries, heads, HEAD]

const OUT_CHUNKS: u32 = min(CHUNKS, 4u);

fn load_gradients(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        outer_tile[place(i)] = hold(gradient_unit(rows, first, chunk, i));
    }
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let queries = sizes.queries;
    let keys = sizes.keys;
    let heads = sizes.heads;
    let own = block_of(group, groups, queries);
    if own.image >= sizes.batch { return; } // the whole workgroup, before any barrier
    let image = own.image;
    let head = own.head;
    let slice = own.slice;
    let start = own.start;
    let query_rows = rows_of(image, head, heads, queries);
    let key_rows = rows_of(image, head, heads, keys);
    let x = thread % 8u;
    let y = thread / 8u;
    let row = start + 4u * y;
    let bias_at = image * sizes.bias_batch + head * sizes.bias_head;
    let statistics = (image * heads + head) * queries;

    // Rows beyond the last have p = exp(0 - 0) and ds = 0: their g, q and delta are zeros.
    var row_lse = vec4<f32>();
    var row_delta = vec4<f32>();
    for (var r = 0u; r < 4u; r += 1u) {
        if row + r < queries {
            row_lse[r] = lse[statistics + row + r];
            row_delta[r] = delta[statistics + row + r];
        }
    }
    var sums: Sums;
    for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) { sums[i] = vec4<f32>(); }
    for (var first = 0u; first < keys; first += TILE) {
        var dp = array<vec4<f32>, 4>();
        for (var c = 0u; c < CHUNKS; c += 1u) {
            workgroupBarrier();
            load_gradients(query_rows, start, c, thread);
            load_values(key_rows, first, c, thread);
            workgroupBarrier();
            add_scores(x, y, &dp);
        }
        var s = array<vec4<f32>, 4>();
        for (var c = 0u; c < CHUNKS; c += 1u) {
            workgroupBarrier();
            load_queries(query_rows, start, c, thread);
            load_keys(key_rows, first, c, thread);
            workgroupBarrier();
            add_scores(x, y, &s);
        }
        for (var j = 0u; j < 4u; j += 1u) {
            let key = first + x + 8u * j;
            s[j] *= sizes.scale;
            if sizes.has_bias == 1u && key < keys {
                for (var r = 0u; r < 4u; r += 1u) {
                    if row + r < queries { s[j][r] += bias[bias_at + (row + r) * keys + key]; }
                }
            }
            // A large lse has lost its last digits; p is never above 1.
            let p = exp2(min((s[j] - row_lse) * LOG2E, vec4<f32>()));
            let ds = select(vec4<f32>(), p * (dp[j] - row_delta), key < keys);
            weights[weight_index(x + 8u * j, y)] = ds;
        }

        for (var c = 0u; c < OUT_CHUNKS; c += 1u) {
            workgroupBarrier();
            // A single chunk of keys is still there.
            if CHUNKS > 1u {
                load_keys(key_rows, first, slice * OUT_CHUNKS + c, thread);
                workgroupBarrier();
            }
            add_products(x, y, c, &sums);
        }
    }
    for (var r = 0u; r < 4u; r += 1u) {
        if row + r >= queries { break; }
        let at = ((image * queries + row + r) * heads + head) * HEAD;
        for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) {
            let column = (slice * OUT_CHUNKS + i / PER) * COLUMNS + x + 8u * (i % PER);
            if column < HEAD { gq[at + column] = sums[i][r] * sizes.scale; }
        }
    }
}
