// The product on a device's matrix units (tensor cores). A workgroup makes 128 x 128 numbers of the
// result from slices of 32 channels of both sides, f16 in workgroup memory. Each of its eight
// subgroups of 32 threads sums up 64 x 32 of them, as 4 x 2 matrices of 16 x 16 in f32.

const ROWS: u32 = 128u;
const COLUMNS: u32 = 128u;
const DEPTH: u32 = 32u;
const LEFT: u32 = DEPTH / 4u + 2u;    // quads from a row to the next: those of a matrix's rows
const RIGHT: u32 = COLUMNS / 4u + 2u; // then lie in different banks

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

var<workgroup> left: array<Quad, ROWS * LEFT>;    // [ROWS, LEFT]
var<workgroup> right: array<Quad, DEPTH * RIGHT>; // [DEPTH, RIGHT]
var<workgroup> made: array<f32, 2048>;            // a matrix of each subgroup

// What a thread fetches of a slice: four channels of four rows, 32 apart; 4 x 4 weights.
struct Slice { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, w: mat4x4<f32> }

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32,
) {
    let tiles = (sizes.columns + COLUMNS - 1u) / COLUMNS;
    let tile = sizes.first + group.y * groups.x + group.x;
    let first_row = tile / tiles * ROWS;
    let first_column = tile % tiles * COLUMNS;
    if first_row >= sizes.rows { return; }
    let quad = thread % 8u;
    let row = thread / 8u;
    let own = fetched_by(thread, DEPTH, COLUMNS);
    let column = first_column + 4u * own.y;
    let of_left = subgroup / 4u * 64u * LEFT;
    let of_right = subgroup % 4u * 8u;

    // By rows of matrices: s of the left column of matrices, t of the right one.
    var s0: Sums; var s1: Sums; var s2: Sums; var s3: Sums;
    var t0: Sums; var t1: Sums; var t2: Sums; var t3: Sums;
    let places = sizes.kernel_h * sizes.kernel_w;
    var place = 0u;
    var first = 0u;
    var rows = sources(first_row + row, 0u);
    var next = fetch(rows, 4u * quad, 0u, own.x, column);
    while place < places {
        workgroupBarrier();
        let at = row * LEFT + quad;
        left[at] = hold4(next.r0);
        left[at + 32u * LEFT] = hold4(next.r1);
        left[at + 64u * LEFT] = hold4(next.r2);
        left[at + 96u * LEFT] = hold4(next.r3);
        let to = own.x * RIGHT + own.y;
        right[to] = hold4(next.w[0]);
        right[to + RIGHT] = hold4(next.w[1]);
        right[to + 2u * RIGHT] = hold4(next.w[2]);
        right[to + 3u * RIGHT] = hold4(next.w[3]);
        workgroupBarrier();
        // Memory answers while this slice is multiplied.
        first += DEPTH;
        if first >= sizes.inner {
            first = 0u;
            place += 1u;
            if place < places { rows = sources(first_row + row, place); }
        }
        if place < places {
            next = fetch(rows, first + 4u * quad, place, first + own.x, column);
        }
        for (var k = 0u; k < 2u; k += 1u) {
            let a = of_left + 4u * k;
            let b = of_right + 16u * k * RIGHT;
            let b0 = coopLoadT<Right>(&right[b], RIGHT);
            let b1 = coopLoadT<Right>(&right[b + 4u], RIGHT);
            let a0 = coopLoadT<Left>(&left[a], LEFT);
            s0 = coopMultiplyAdd(a0, b0, s0); t0 = coopMultiplyAdd(a0, b1, t0);
            let a1 = coopLoadT<Left>(&left[a + 16u * LEFT], LEFT);
            s1 = coopMultiplyAdd(a1, b0, s1); t1 = coopMultiplyAdd(a1, b1, t1);
            let a2 = coopLoadT<Left>(&left[a + 32u * LEFT], LEFT);
            s2 = coopMultiplyAdd(a2, b0, s2); t2 = coopMultiplyAdd(a2, b1, t2);
            let a3 = coopLoadT<Left>(&left[a + 48u * LEFT], LEFT);
            s3 = coopMultiplyAdd(a3, b0, s3); t3 = coopMultiplyAdd(a3, b1, t3);
        }
    }
    let r = first_row + subgroup / 4u * 64u;
    let c = first_column + subgroup % 4u * 32u;
    let m = 256u * subgroup;
    coopStoreT(s0, &made[m], 16u); write(m, lane, r, c);
    coopStoreT(t0, &made[m], 16u); write(m, lane, r, c + 16u);
    coopStoreT(s1, &made[m], 16u); write(m, lane, r + 16u, c);
    coopStoreT(t1, &made[m], 16u); write(m, lane, r + 16u, c + 16u);
    coopStoreT(s2, &made[m], 16u); write(m, lane, r + 32u, c);
    coopStoreT(t2, &made[m], 16u); write(m, lane, r + 32u, c + 16u);
    coopStoreT(s3, &made[m], 16u); write(m, lane, r + 48u, c);
    coopStoreT(t3, &made[m], 16u); write(m, lane, r + 48u, c + 16u);
}

// The rows of the source that a thread fetches for a place.
fn sources(row: u32, place: u32) -> vec4<u32> {
    return vec4<u32>(
        source_row(row, place), source_row(row + 32u, place),
        source_row(row + 64u, place), source_row(row + 96u, place),
    );
}

fn fetch(rows: vec4<u32>, c: u32, place: u32, channel: u32, column: u32) -> Slice {
    return Slice(
        channels4(rows.x, c), channels4(rows.y, c), channels4(rows.z, c), channels4(rows.w, c),
        weights4x4(place, channel, column),
    );
}

// Writes what a subgroup has made: eight rows of 16 numbers, twice.
fn write(m: u32, lane: u32, row: u32, column: u32) {
    workgroupBarrier();
    for (var i = lane; i < 64u; i += 32u) {
        let at = m + 4u * i;
        let r = row + i / 4u;
        if r < sizes.rows {
            let values = vec4<f32>(made[at], made[at + 1u], made[at + 2u], made[at + 3u]);
            write4(r, column + 4u * (i % 4u), values);
        }
    }
    workgroupBarrier();
}
