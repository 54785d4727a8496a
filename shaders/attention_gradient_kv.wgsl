// The keys' and values' gradients of attention: gv = p^T g, gk = scale ds^T q, with p and ds of
// attention_gradient_q.wgsl. Here keys are outside and queries inside: every number of gk and gv
// is one thread's sum in a fixed order. Grid: batch x heads x SLICES x splits x
// blocks of 32 keys, folded.
//
// Few keys (77 words of a prompt) make few workgroups: then the queries are split into `splits`
// runs, whose results lie one after the other, for the caller to add up in order. For the same
// bits at every batch size `splits` must not depend on it.

// Bindings 0 to 7 are in shared/attention_bindings.wgsl and shared/attention_given.wgsl.
@group(0) @binding(8) var<storage, read_write> gk: array<f32>;    // [splits, ..] of k
@group(0) @binding(9) var<storage, read_write> gv: array<f32>;    // [splits, ..] of k

const OUT_CHUNKS: u32 = min(CHUNKS, 2u);

fn load_keys(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        outer_tile[place(i)] = hold(key_unit(rows, first, chunk, i));
    }
}
fn load_values(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        outer_tile[place(i)] = hold(value_unit(rows, first, chunk, i));
    }
}
fn load_queries(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        inner_tile[place(i)] = hold(query_unit(rows, first, chunk, i));
    }
}
fn load_gradients(rows: Rows, first: u32, chunk: u32, thread: u32) {
    for (var i = thread; i < TILE * CHUNK; i += THREADS) {
        inner_tile[place(i)] = hold(gradient_unit(rows, first, chunk, i));
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
    let own = block_of(group, groups, keys);
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
    // Whole tiles a split.
    let run = (queries + TILE * sizes.splits - 1u) / (TILE * sizes.splits) * TILE;
    let end = min((own.split + 1u) * run, queries);

    var key_sums: Sums;
    var value_sums: Sums;
    for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) {
        key_sums[i] = vec4<f32>();
        value_sums[i] = vec4<f32>();
    }
    for (var first = own.split * run; first < end; first += TILE) {
        var s = array<vec4<f32>, 4>();
        for (var c = 0u; c < CHUNKS; c += 1u) {
            workgroupBarrier();
            load_keys(key_rows, start, c, thread);
            load_queries(query_rows, first, c, thread);
            workgroupBarrier();
            add_scores(x, y, &s);
        }
        var dp = array<vec4<f32>, 4>();
        for (var c = 0u; c < CHUNKS; c += 1u) {
            workgroupBarrier();
            load_values(key_rows, start, c, thread);
            load_gradients(query_rows, first, c, thread);
            workgroupBarrier();
            add_scores(x, y, &dp);
        }
        for (var j = 0u; j < 4u; j += 1u) {
            let query = first + x + 8u * j;
            var p = vec4<f32>();
            var ds = vec4<f32>();
            if query < queries {
                s[j] *= sizes.scale;
                if sizes.has_bias == 1u {
                    for (var r = 0u; r < 4u; r += 1u) {
                        if row + r < keys { s[j][r] += bias[bias_at + query * keys + row + r]; }
                    }
                }
                // A large lse has lost its last digits; p is never above 1.
                p = exp2(min((s[j] - lse[statistics + query]) * LOG2E, vec4<f32>()));
                ds = p * (dp[j] - delta[statistics + query]);
            }
            weights[weight_index(x + 8u * j, y)] = p;
            s[j] = ds;
        }
        for (var c = 0u; c < OUT_CHUNKS; c += 1u) {
            workgroupBarrier();
            // A single chunk of the gradient is still there.
            if CHUNKS > 1u {
                load_gradients(query_rows, first, slice * OUT_CHUNKS + c, thread);
                workgroupBarrier();
            }
            add_products(x, y, c, &value_sums);
        }
        workgroupBarrier();
        for (var j = 0u; j < 4u; j += 1u) { weights[weight_index(x + 8u * j, y)] = s[j]; }
        for (var c = 0u; c < OUT_CHUNKS; c += 1u) {
            workgroupBarrier();
            load_queries(query_rows, first, slice * OUT_CHUNKS + c, thread);
            workgroupBarrier();
            add_products(x, y, c, &key_sums);
        }
    }
    for (var r = 0u; r < 4u; r += 1u) {
        if row + r >= keys { break; }
        let at = (((own.split * sizes.batch + image) * keys + row + r) * heads + head) * HEAD;
        for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) {
            let column = (slice * OUT_CHUNKS + i / PER) * COLUMNS + x + 8u * (i % PER);
            if column < HEAD {
                gk[at + column] = key_sums[i][r] * sizes.scale;
                gv[at + column] = value_sums[i][r];
            }
        }
    }
}
