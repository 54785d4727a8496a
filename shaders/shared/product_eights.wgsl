// The product where subgroups are eight wide, see eights.wgsl.
//
// Each of a workgroup's eight subgroups makes 32 x 32 numbers by itself. Thread x reads four
// channels of rows x, x + 8, x + 16 and x + 24, which all of them use, and has four columns.

const ROWS: u32 = 256u;
const COLUMNS: u32 = 32u;

fn write(row: u32, column: u32, sums: Sums) {
    for (var i = 0u; i < 8u && row + i < sizes.rows; i += 1u) {
        write4(row + i, column, sums[i]);
    }
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) x: u32,
) {
    let tiles = (sizes.columns + COLUMNS - 1u) / COLUMNS;
    let tile = sizes.first + group.y * groups.x + group.x;
    let first_row = tile / tiles * ROWS + 32u * subgroup;
    let column = tile % tiles * COLUMNS + 4u * x;
    if first_row >= sizes.rows { return; } // the whole subgroup
    let row = first_row + x;
    var s0 = Sums(); var s1 = Sums(); var s2 = Sums(); var s3 = Sums();
    for (var place = 0u; place < sizes.kernel_h * sizes.kernel_w; place += 1u) {
        let r0 = source_row(row, place); let r1 = source_row(row + 8u, place);
        let r2 = source_row(row + 16u, place); let r3 = source_row(row + 24u, place);
        for (var c = 0u; c < sizes.inner; c += 4u) {
            let m = weights4x4(place, c, column);
            let m0 = hold4(m[0]); let m1 = hold4(m[1]); let m2 = hold4(m[2]); let m3 = hold4(m[3]);
            let a = hold4(channels4(r0, c)); let b = hold4(channels4(r1, c));
            let d = hold4(channels4(r2, c)); let e = hold4(channels4(r3, c));
            add(&s0, a.x, m0); add(&s1, b.x, m0); add(&s2, d.x, m0); add(&s3, e.x, m0);
            add(&s0, a.y, m1); add(&s1, b.y, m1); add(&s2, d.y, m1); add(&s3, e.y, m1);
            add(&s0, a.z, m2); add(&s1, b.z, m2); add(&s2, d.z, m2); add(&s3, e.z, m2);
            add(&s0, a.w, m3); add(&s1, b.w, m3); add(&s2, d.w, m3); add(&s3, e.w, m3);
        }
    }
    write(first_row, column, s0); write(first_row + 8u, column, s1);
    write(first_row + 16u, column, s2); write(first_row + 24u, column, s3);
}
