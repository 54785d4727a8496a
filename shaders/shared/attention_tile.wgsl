// Shared by attention and its gradients: how a tile of scores lies over a workgroup. HEAD, the
// width of a head, is a constant put before the source (`const HEAD: u32 = 40u;`): the sizes of
// arrays in registers depend on it.
//
// A workgroup owns 32 outer rows of one head and walks over the inner rows of the other side in
// tiles of 32 (attention: queries outside, keys inside). Its 8 x 8 threads hold the 32 x 32
// scores in registers: thread (x, y) those of outer rows 4 y .. 4 y + 3, as the lanes of a vec4,
// and of inner rows x, x + 8, x + 16, x + 24. Each number that is read from workgroup memory so
// serves four products.
//
// The head is taken in chunks of at most 40 columns, which fit workgroup memory twice (outer and
// inner rows). Results hold at most OUT_CHUNKS chunks of columns in registers; wider heads are
// sliced: more workgroups, each with the scores anew. Only heads above 160 (80 for keys and
// values' gradients) pay that.

const THREADS: u32 = 64u;
const TILE: u32 = 32u;
const CHUNKS: u32 = (HEAD + 39u) / 40u;
const COLUMNS: u32 = (HEAD + 8u * CHUNKS - 1u) / (8u * CHUNKS) * 8u; // of a chunk
const UNITS: u32 = HEAD / WIDTH;
const CHUNK: u32 = COLUMNS / WIDTH; // units of a chunk
const STRIDE: u32 = CHUNK + 1u;     // odd: rows start at different banks of memory
const PER: u32 = COLUMNS / 8u;      // columns of a chunk that a thread sums up
const SLICES: u32 = (CHUNKS + OUT_CHUNKS - 1u) / OUT_CHUNKS;
const LOG2E: f32 = 1.4426950408889634;
const LOWEST: f32 = -3.4e38;

// Together 16 KiB with attention's own 1 KiB, the least that every device has.
var<workgroup> outer_tile: array<Held, TILE * STRIDE>;
var<workgroup> inner_tile: array<Held, TILE * STRIDE>;
var<workgroup> weights: array<vec4<f32>, TILE * 8u>; // [inner row, y], see weight_index

// Eight neighbours of a row of eight write different inner rows: turned, so that they hit
// different banks.
fn weight_index(i: u32, y: u32) -> u32 { return i * 8u + (y + i) % 8u; }

// Where one head of one image lies in a tensor [batch, rows, heads, HEAD], in units of Lanes.
struct Rows { start: u32, stride: u32, count: u32 }

fn rows_of(image: u32, head: u32, heads: u32, count: u32) -> Rows {
    return Rows((image * count * heads + head) * UNITS, heads * UNITS, count);
}

// Unit i of a chunk of the tile from row `first` on: whether the tensor has it (the rest of a tile
// is zeros), where, and its place in the tile.
fn held(rows: Rows, first: u32, chunk: u32, i: u32) -> bool {
    return first + i / CHUNK < rows.count && chunk * CHUNK + i % CHUNK < UNITS;
}
fn source(rows: Rows, first: u32, chunk: u32, i: u32) -> u32 {
    return rows.start + (first + i / CHUNK) * rows.stride + chunk * CHUNK + i % CHUNK;
}
fn place(i: u32) -> u32 { return i / CHUNK * STRIDE + i % CHUNK; }

fn query_unit(rows: Rows, first: u32, chunk: u32, i: u32) -> Lanes {
    if !held(rows, first, chunk, i) { return Lanes(); }
    return q[source(rows, first, chunk, i)];
}
fn key_unit(rows: Rows, first: u32, chunk: u32, i: u32) -> Lanes {
    if !held(rows, first, chunk, i) { return Lanes(); }
    return k[source(rows, first, chunk, i)];
}
fn value_unit(rows: Rows, first: u32, chunk: u32, i: u32) -> Lanes {
    if !held(rows, first, chunk, i) { return Lanes(); }
    return v[source(rows, first, chunk, i)];
}

// What a workgroup owns: outer rows from `start` on of a head of an image, a slice of its columns,
// and one of the splits of its inner rows.
struct Block { image: u32, head: u32, start: u32, slice: u32, split: u32 }

fn block_of(group: vec3<u32>, groups: vec3<u32>, outer_rows: u32) -> Block {
    let blocks = (outer_rows + TILE - 1u) / TILE;
    let tile = sizes.first + group.y * groups.x + group.x;
    let split = tile / blocks;
    let slice = split / sizes.splits;
    let head = slice / SLICES;
    return Block(
        head / sizes.heads, head % sizes.heads, tile % blocks * TILE, slice % SLICES,
        split % sizes.splits,
    );
}

// Adds a chunk's share to the scores of this thread.
fn add_scores(x: u32, y: u32, scores: ptr<function, array<vec4<f32>, 4>>) {
    for (var u = 0u; u < CHUNK; u += 1u) {
        let at = y * 4u * STRIDE + u;
        let a0 = Lanes(outer_tile[at]);
        let a1 = Lanes(outer_tile[at + STRIDE]);
        let a2 = Lanes(outer_tile[at + 2u * STRIDE]);
        let a3 = Lanes(outer_tile[at + 3u * STRIDE]);
        for (var j = 0u; j < 4u; j += 1u) {
            let b = Lanes(inner_tile[(x + 8u * j) * STRIDE + u]);
            let s = (*scores)[j];
            (*scores)[j] = vec4<f32>(
                dot_add(a0, b, s.x), dot_add(a1, b, s.y), dot_add(a2, b, s.z), dot_add(a3, b, s.w),
            );
        }
    }
}

// Results of a thread: PER columns of each chunk of the slice, four rows as the lanes.
alias Sums = array<vec4<f32>, PER * OUT_CHUNKS>;

// Adds a chunk's share: the tile's weights times the inner rows.
fn add_products(x: u32, y: u32, c: u32, sums: ptr<function, Sums>) {
    for (var row = 0u; row < TILE; row += 1u) {
        let weight = weights[weight_index(row, y)];
        for (var i = 0u; i < PER; i += 1u) {
            let value = vec4<f32>(inner_element(row, x + 8u * i));
            (*sums)[c * PER + i] = fma(weight, value, (*sums)[c * PER + i]);
        }
    }
}
