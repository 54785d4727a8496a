// attention_gradient_kv.wgsl where subgroups are eight wide: follows attention_eights.wgsl. Here
// keys are outside and queries inside; queries are never split.

// Bindings 0 to 7 are in shared/attention_bindings.wgsl and shared/attention_given.wgsl.
@group(0) @binding(8) var<storage, read_write> gk: array<f32>;    // [batch, keys, heads, HEAD]
@group(0) @binding(9) var<storage, read_write> gv: array<f32>;    // [batch, keys, heads, HEAD]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) x: u32,
) {
    let queries = sizes.queries;
    let keys = sizes.keys;
    let own = block_of((sizes.first + group.y * groups.x + group.x) * 8u + subgroup, keys);
    if own.image >= sizes.batch { return; } // the whole subgroup
    let stride = sizes.heads * HEAD;
    let row = own.start + 4u * x;
    let outer = outer_rows(own, keys, row);
    let bias_at = own.image * sizes.bias_batch + own.head * sizes.bias_head;
    let statistics = (own.image * sizes.heads + own.head) * queries;

    var key_sums = Columns();
    var value_sums = Columns();
    for (var first = 0u; first < queries; first += TILE) {
        let inner = tile_rows(own, queries, first + x);
        var s = Scores();
        var dp = Scores();
        for (var d = 0u; d < HEAD; d += 1u) {
            scores(&s, four_q(inner, d), four_k(outer, d));
        }
        for (var d = 0u; d < HEAD; d += 1u) {
            scores(&dp, four_g(inner, d), four_v(outer, d));
        }
        let held = min(TILE, queries - first);
        for (var i = 0u; i < held; i += 1u) {
            let query = first + i;
            var scaled = s[i] * sizes.scale;
            if sizes.has_bias == 1u {
                for (var r = 0u; r < 4u; r += 1u) {
                    scaled[r] += bias[bias_at + query * keys + min(row + r, keys - 1u)];
                }
            }
            // A large lse has lost its last digits; p is never above 1.
            let p = exp2(min((scaled - lse[statistics + query]) * LOG2E, vec4<f32>()));
            s[i] = p;
            dp[i] = p * (dp[i] - delta[statistics + query]);
        }
        let at = row_at(own.image, own.head, queries, first);
        for (var u = 0u; u < OUT_UNITS; u += 1u) {
            let column = at + column_of(own.unit + u, x);
            var of_values = Sums();
            var of_keys = Sums();
            for (var i = 0u; i < held; i += 1u) {
                add(&of_values, hold1(g[column + i * stride]), s[i]);
                add(&of_keys, hold1(q[column + i * stride]), dp[i]);
            }
            collect(&value_sums, u, of_values);
            collect(&key_sums, u, of_keys);
        }
    }
    for (var r = 0u; r < 4u && row + r < keys; r += 1u) {
        let at = row_at(own.image, own.head, keys, row + r);
        for (var i = 0u; i < 8u * OUT_UNITS && 8u * own.unit + i < HEAD; i += 1u) {
            gk[at + 8u * own.unit + i] = key_sums[i][r] * sizes.scale;
            gv[at + 8u * own.unit + i] = value_sums[i][r];
        }
    }
}
