// The product by tiles. A workgroup makes 64 x 64 numbers of the result, from slices of 16 channels
// of both sides in workgroup memory. Thread (x, y) of 8 x 8 holds 8 columns of 8 rows in registers:
// four vectors from workgroup memory serve 64 products.

const ROWS: u32 = 64u;
const COLUMNS: u32 = 64u;
const DEPTH: u32 = 16u;

var<workgroup> left: array<Quad, 256>;  // [DEPTH, quads of rows]
var<workgroup> right: array<Quad, 256>; // [DEPTH, quads of columns]

// Where a quad of a slice lies. Turned by the depth: eight neighbouring threads that store four
// depths of two quads hit different banks, and so do those that read one depth of eight quads.
// The turn is below 8, so that quad + 8 lies 8 after quad.
fn at(depth: u32, quad: u32) -> u32 { return depth * 16u + (quad ^ (depth / 4u * 2u)); }

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let tiles = (sizes.columns + COLUMNS - 1u) / COLUMNS;
    let tile = sizes.first + group.y * groups.x + group.x;
    let first_row = tile / tiles * ROWS;
    let first_column = tile % tiles * COLUMNS;
    if first_row >= sizes.rows { return; }
    let x = thread % 8u;
    let y = thread / 8u;
    // What this thread fetches of the left side: four channels of four rows.
    let depth = 4u * (thread % 4u);
    let quad = thread / 4u;
    let row = first_row + 4u * quad;
    let own = fetched_by(thread, DEPTH, COLUMNS);

    // Sums by row: s of the columns 4 x .., t of those 32 further; 0 to 3 of the rows 4 y ..,
    // 4 to 7 of those 32 further.
    var s0 = vec4<f32>(); var s1 = vec4<f32>(); var s2 = vec4<f32>(); var s3 = vec4<f32>();
    var s4 = vec4<f32>(); var s5 = vec4<f32>(); var s6 = vec4<f32>(); var s7 = vec4<f32>();
    var t0 = vec4<f32>(); var t1 = vec4<f32>(); var t2 = vec4<f32>(); var t3 = vec4<f32>();
    var t4 = vec4<f32>(); var t5 = vec4<f32>(); var t6 = vec4<f32>(); var t7 = vec4<f32>();
    for (var place = 0u; place < sizes.kernel_h * sizes.kernel_w; place += 1u) {
        let r0 = source_row(row, place); let r1 = source_row(row + 1u, place);
        let r2 = source_row(row + 2u, place); let r3 = source_row(row + 3u, place);
        for (var first = 0u; first < sizes.inner; first += DEPTH) {
            // Memory answers while other workgroups still multiply: fetched before the barrier.
            let c = first + depth;
            let fetched = transpose(mat4x4<f32>(
                channels4(r0, c), channels4(r1, c), channels4(r2, c), channels4(r3, c),
            ));
            let matrix = weights4x4(place, first + own.x, first_column + 4u * own.y);
            workgroupBarrier();
            for (var i = 0u; i < 4u; i += 1u) {
                left[at(depth + i, quad)] = hold4(fetched[i]);
                right[at(own.x + i, own.y)] = hold4(matrix[i]);
            }
            workgroupBarrier();
            // Four depths share a turn: no address is made anew for each.
            for (var four = 0u; four < DEPTH / 4u; four += 1u) {
                let of_b = at(4u * four, x);
                let of_a = at(4u * four, y);
                for (var k = 0u; k < 64u; k += 16u) {
                    let b = vec4<f32>(right[of_b + k]);
                    let c = vec4<f32>(right[of_b + k + 8u]);
                    let a = vec4<f32>(left[of_a + k]);
                    s0 = fma(vec4<f32>(a.x), b, s0); t0 = fma(vec4<f32>(a.x), c, t0);
                    s1 = fma(vec4<f32>(a.y), b, s1); t1 = fma(vec4<f32>(a.y), c, t1);
                    s2 = fma(vec4<f32>(a.z), b, s2); t2 = fma(vec4<f32>(a.z), c, t2);
                    s3 = fma(vec4<f32>(a.w), b, s3); t3 = fma(vec4<f32>(a.w), c, t3);
                    let d = vec4<f32>(left[of_a + k + 8u]);
                    s4 = fma(vec4<f32>(d.x), b, s4); t4 = fma(vec4<f32>(d.x), c, t4);
                    s5 = fma(vec4<f32>(d.y), b, s5); t5 = fma(vec4<f32>(d.y), c, t5);
                    s6 = fma(vec4<f32>(d.z), b, s6); t6 = fma(vec4<f32>(d.z), c, t6);
                    s7 = fma(vec4<f32>(d.w), b, s7); t7 = fma(vec4<f32>(d.w), c, t7);
                }
            }
        }
    }
    let r = first_row + 4u * y;
    let column = first_column + 4u * x;
    write(r, column, s0, t0); write(r + 1u, column, s1, t1);
    write(r + 2u, column, s2, t2); write(r + 3u, column, s3, t3);
    write(r + 32u, column, s4, t4); write(r + 33u, column, s5, t5);
    write(r + 34u, column, s6, t6); write(r + 35u, column, s7, t7);
}

fn write(row: u32, column: u32, s: vec4<f32>, t: vec4<f32>) {
    if row >= sizes.rows { return; }
    write4(row, column, s);
    write4(row, column + 32u, t);
}
