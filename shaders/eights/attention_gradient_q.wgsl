// attention_gradient_q.wgsl where subgroups are eight wide: follows attention_eights.wgsl.

// Bindings 0 to 7 are in shared/attention_bindings.wgsl and shared/attention_given.wgsl.
@group(0) @binding(8) var<storage, read_write> gq: array<f32>;    // [batch, queries, heads, HEAD]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) x: u32,
) {
    let queries = sizes.queries;
    let keys = sizes.keys;
    let own = block_of((sizes.first + group.y * groups.x + group.x) * 8u + subgroup, queries);
    if own.image >= sizes.batch { return; } // the whole subgroup
    let stride = sizes.heads * HEAD;
    let row = own.start + 4u * x;
    let outer = outer_rows(own, queries, row);
    let bias_at = own.image * sizes.bias_batch + own.head * sizes.bias_head;
    let statistics = (own.image * sizes.heads + own.head) * queries;
    var row_lse = vec4<f32>();
    var row_delta = vec4<f32>();
    for (var r = 0u; r < 4u; r += 1u) {
        row_lse[r] = lse[statistics + min(row + r, queries - 1u)];
        row_delta[r] = delta[statistics + min(row + r, queries - 1u)];
    }

    var sums = Columns();
    for (var first = 0u; first < keys; first += TILE) {
        let inner = tile_rows(own, keys, first + x);
        var s = Scores();
        var dp = Scores();
        for (var d = 0u; d < HEAD; d += 1u) {
            scores(&s, four_k(inner, d), four_q(outer, d));
        }
        for (var d = 0u; d < HEAD; d += 1u) {
            scores(&dp, four_v(inner, d), four_g(outer, d));
        }
        let held = min(TILE, keys - first);
        for (var i = 0u; i < held; i += 1u) {
            var scaled = s[i] * sizes.scale;
            if sizes.has_bias == 1u {
                for (var r = 0u; r < 4u; r += 1u) {
                    scaled[r] += bias[bias_at + min(row + r, queries - 1u) * keys + first + i];
                }
            }
            // A large lse has lost its last digits; p is never above 1.
            let p = exp2(min((scaled - row_lse) * LOG2E, vec4<f32>()));
            s[i] = p * (dp[i] - row_delta);
        }
        let at = row_at(own.image, own.head, keys, first);
        for (var u = 0u; u < OUT_UNITS; u += 1u) {
            let column = at + column_of(own.unit + u, x);
            var share = Sums();
            for (var i = 0u; i < held; i += 1u) {
                add(&share, hold1(k[column + i * stride]), s[i]);
            }
            collect(&sums, u, share);
        }
    }
    for (var r = 0u; r < 4u && row + r < queries; r += 1u) {
        let at = row_at(own.image, own.head, queries, row + r);
        for (var i = 0u; i < 8u * OUT_UNITS && 8u * own.unit + i < HEAD; i += 1u) {
            gq[at + 8u * own.unit + i] = sums[i][r] * sizes.scale;
        }
    }
}
