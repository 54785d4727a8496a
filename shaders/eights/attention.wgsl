// attention.wgsl where subgroups are eight wide: follows attention_eights.wgsl.

// Bindings 0 to 4 are in shared/attention_bindings.wgsl.
@group(0) @binding(5) var<storage, read_write> out: array<f32>;   // [batch, queries, heads, HEAD]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;   // [batch, heads, queries]

// The place of an inner row among the scores, which is in range anyway. Without the bound, here
// and of r below, lavapipe's compiler unrolls the loops over them and takes minutes.
fn bounded(i: u32) -> u32 { return min(i, TILE - 1u); }

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

    var sums = Columns();
    var top = vec4<f32>(LOWEST);
    var total = vec4<f32>();
    for (var first = 0u; first < keys; first += TILE) {
        let inner = tile_rows(own, keys, first + x);
        var s = Scores();
        for (var d = 0u; d < HEAD; d += 1u) {
            scores(&s, four_k(inner, d), four_q(outer, d));
        }

        // In powers of two from here on, which is what devices compute.
        var own_top = top;
        for (var i = 0u; i < TILE; i += 1u) {
            let at_i = bounded(i);
            s[at_i] *= sizes.scale * LOG2E;
            if sizes.has_bias == 1u && first + i < keys {
                for (var r = 0u; r < 4u; r += 1u) {
                    let at = bias_at + min(row + r, queries - 1u) * keys + first + i;
                    s[at_i][min(r, 3u)] += bias[at] * LOG2E;
                }
            }
            if first + i >= keys { s[at_i] = vec4<f32>(LOWEST); }
            own_top = max(own_top, s[at_i]);
        }
        let keep = exp2(top - own_top);
        top = own_top;
        total *= keep;
        for (var i = 0u; i < 8u * OUT_UNITS; i += 1u) { sums[i] *= keep; }
        let held = min(TILE, keys - first);
        for (var i = 0u; i < held; i += 1u) {
            let at_i = bounded(i);
            s[at_i] = exp2(s[at_i] - top);
            total += s[at_i];
        }
        let at = row_at(own.image, own.head, keys, first);
        for (var u = 0u; u < OUT_UNITS; u += 1u) {
            let column = at + column_of(own.unit + u, x);
            var share = Sums();
            for (var i = 0u; i < held; i += 1u) {
                add(&share, hold1(v[column + i * stride]), s[bounded(i)]);
            }
            collect(&sums, u, share);
        }
    }

    for (var r = 0u; r < 4u && row + r < queries; r += 1u) {
        let at = row_at(own.image, own.head, queries, row + r);
        for (var i = 0u; i < 8u * OUT_UNITS && 8u * own.unit + i < HEAD; i += 1u) {
            out[at + 8u * own.unit + i] = sums[i][r] / total[r];
        }
        if own.unit == 0u {
            let statistics = (own.image * sizes.heads + own.head) * queries;
            lse[statistics + row + r] = (top[r] + log2(total[r])) / LOG2E;
        }
    }
}
