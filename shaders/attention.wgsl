// Attention without a matrix of scores in memory: softmax(scale q k^T + bias) v, by keeping the
// running maximum and sum of every row (online softmax). Grid: batch x heads x SLICES x blocks of
// 32 queries, folded. A row's numbers depend on its image and head alone.

// Bindings 0 to 4, sizes, q, k, v and bias, are in shared/attention_bindings.wgsl.
@group(0) @binding(5) var<storage, read_write> out: array<f32>;   // [batch, queries, heads, HEAD]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;   // [batch, heads, queries]

const OUT_CHUNKS: u32 = min(CHUNKS, 4u);

var<workgroup> shares: array<vec4<f32>, THREADS>;

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

    var sums: Sums;
    for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) { sums[i] = vec4<f32>(); }
    var top = vec4<f32>(LOWEST);
    var total = vec4<f32>(); // of this thread's keys only, until the end
    for (var first = 0u; first < keys; first += TILE) {
        var s = array<vec4<f32>, 4>();
        for (var c = 0u; c < CHUNKS; c += 1u) {
            workgroupBarrier();
            // A single chunk of queries stays.
            if CHUNKS > 1u || first == 0u { load_queries(query_rows, start, c, thread); }
            load_keys(key_rows, first, c, thread);
            workgroupBarrier();
            add_scores(x, y, &s);
        }

        // In powers of two from here on, which is what devices compute.
        var own_top = top;
        for (var j = 0u; j < 4u; j += 1u) {
            let key = first + x + 8u * j;
            s[j] *= sizes.scale * LOG2E;
            if sizes.has_bias == 1u && key < keys {
                var add = vec4<f32>();
                for (var r = 0u; r < 4u; r += 1u) {
                    if row + r < queries { add[r] = bias[bias_at + (row + r) * keys + key]; }
                }
                s[j] += add * LOG2E;
            }
            if key >= keys { s[j] = vec4<f32>(LOWEST); }
            own_top = max(own_top, s[j]);
        }
        shares[thread] = own_top;
        workgroupBarrier();
        for (var i = 0u; i < 8u; i += 1u) { own_top = max(own_top, shares[8u * y + i]); }
        let keep = exp2(top - own_top);
        top = own_top;
        total *= keep;
        for (var j = 0u; j < 4u; j += 1u) {
            let key = x + 8u * j;
            let weight = select(vec4<f32>(), exp2(s[j] - top), first + key < keys);
            total += weight;
            weights[weight_index(key, y)] = weight;
        }

        for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) { sums[i] *= keep; }
        for (var c = 0u; c < OUT_CHUNKS; c += 1u) {
            workgroupBarrier();
            load_values(key_rows, first, slice * OUT_CHUNKS + c, thread);
            workgroupBarrier();
            add_products(x, y, c, &sums);
        }
    }

    shares[thread] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var i = 0u; i < 8u; i += 1u) { total += shares[8u * y + i]; }
    for (var r = 0u; r < 4u; r += 1u) {
        if row + r >= queries { break; }
        let at = ((image * queries + row + r) * heads + head) * HEAD;
        for (var i = 0u; i < PER * OUT_CHUNKS; i += 1u) {
            let column = (slice * OUT_CHUNKS + i / PER) * COLUMNS + x + 8u * (i % PER);
            if column < HEAD { out[at + column] = sums[i][r] / total[r]; }
        }
        if x == 0u && slice == 0u {
            lse[(image * heads + head) * queries + row + r] = (top[r] + log2(total[r])) / LOG2E;
        }
    }
}
