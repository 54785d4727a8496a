// What attention and its gradients share where subgroups are eight wide, see eights.wgsl. HEAD, the
// width of a head, and MOST, the units of eight columns that a result holds in registers, are
// constants put before the source.
//
// A subgroup owns 32 outer rows of one head, four a thread as the lanes of a vec4, and walks over
// the inner rows of the other side in tiles of 32, whose scores it holds (attention: queries
// outside, keys inside). Rows beyond the last are read as the last, and count for nothing.

const TILE: u32 = 32u;
const UNITS: u32 = (HEAD + 7u) / 8u;
const SLICES: u32 = (UNITS + MOST - 1u) / MOST;
const OUT_UNITS: u32 = (UNITS + SLICES - 1u) / SLICES;
const LOG2E: f32 = 1.4426950408889634;
const LOWEST: f32 = -3.4e38;

// Scores of a tile: inner row i with this thread's outer rows.
alias Scores = array<vec4<f32>, 32>;
// Columns of a result, of this thread's outer rows.
alias Columns = array<vec4<f32>, 8u * OUT_UNITS>;

// Adds a tile's share to a unit of columns. A place in an array that is not known when the shader
// is compiled is slow as well: the share is summed up in eight of its own.
fn collect(columns: ptr<function, Columns>, unit: u32, share: Sums) {
    for (var i = 0u; i < 8u; i += 1u) { (*columns)[8u * unit + i] += share[i]; }
}

// Adds one column's share to the scores of eight inner rows.
fn score(sums: ptr<function, Scores>, at: u32, left: f32, right: vec4<f32>) {
    (*sums)[at] = fma(vec4<f32>(subgroupBroadcast(left, 0u)), right, (*sums)[at]);
    (*sums)[at + 1u] = fma(vec4<f32>(subgroupBroadcast(left, 1u)), right, (*sums)[at + 1u]);
    (*sums)[at + 2u] = fma(vec4<f32>(subgroupBroadcast(left, 2u)), right, (*sums)[at + 2u]);
    (*sums)[at + 3u] = fma(vec4<f32>(subgroupBroadcast(left, 3u)), right, (*sums)[at + 3u]);
    (*sums)[at + 4u] = fma(vec4<f32>(subgroupBroadcast(left, 4u)), right, (*sums)[at + 4u]);
    (*sums)[at + 5u] = fma(vec4<f32>(subgroupBroadcast(left, 5u)), right, (*sums)[at + 5u]);
    (*sums)[at + 6u] = fma(vec4<f32>(subgroupBroadcast(left, 6u)), right, (*sums)[at + 6u]);
    (*sums)[at + 7u] = fma(vec4<f32>(subgroupBroadcast(left, 7u)), right, (*sums)[at + 7u]);
}

// The same of all 32, of which a thread has read four.
fn scores(sums: ptr<function, Scores>, left: vec4<f32>, right: vec4<f32>) {
    score(sums, 0u, left.x, right);
    score(sums, 8u, left.y, right);
    score(sums, 16u, left.z, right);
    score(sums, 24u, left.w, right);
}

// Where a row of a head begins in a tensor [batch, count, heads, HEAD].
fn row_at(image: u32, head: u32, count: u32, row: u32) -> u32 {
    return ((image * count + min(row, count - 1u)) * sizes.heads + head) * HEAD;
}

// What a subgroup owns: outer rows from `start` on of a head of an image, and a slice of the
// result's units.
struct Block { image: u32, head: u32, start: u32, unit: u32 }

fn block_of(tile: u32, outer_rows: u32) -> Block {
    let blocks = (outer_rows + TILE - 1u) / TILE;
    let slice = tile / blocks;
    let head = slice / SLICES;
    return Block(
        head / sizes.heads, head % sizes.heads, tile % blocks * TILE, slice % SLICES * OUT_UNITS,
    );
}

// Where four outer rows of a thread begin, and the rows of a tile that it reads for its subgroup.
fn outer_rows(own: Block, count: u32, row: u32) -> vec4<u32> {
    return vec4<u32>(
        row_at(own.image, own.head, count, row), row_at(own.image, own.head, count, row + 1u),
        row_at(own.image, own.head, count, row + 2u), row_at(own.image, own.head, count, row + 3u),
    );
}
fn tile_rows(own: Block, count: u32, row: u32) -> vec4<u32> {
    return vec4<u32>(
        row_at(own.image, own.head, count, row), row_at(own.image, own.head, count, row + 8u),
        row_at(own.image, own.head, count, row + 16u),
        row_at(own.image, own.head, count, row + 24u),
    );
}

// One column of four rows.
fn four_q(at: vec4<u32>, d: u32) -> vec4<f32> {
    return hold4(vec4<f32>(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]));
}
fn four_k(at: vec4<u32>, d: u32) -> vec4<f32> {
    return hold4(vec4<f32>(k[at.x + d], k[at.y + d], k[at.z + d], k[at.w + d]));
}
fn four_v(at: vec4<u32>, d: u32) -> vec4<f32> {
    return hold4(vec4<f32>(v[at.x + d], v[at.y + d], v[at.z + d], v[at.w + d]));
}

// The column that a thread fetches of a unit.
fn column_of(unit: u32, x: u32) -> u32 { return min(8u * unit + x, HEAD - 1u); }
