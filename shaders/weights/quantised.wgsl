// Weights [rows, width] in BITS bits with their sign, the first of a word in the lowest bits. In
// each column 32 rows share a scale. Follows `const BITS: u32`, 8 or 4.

@group(0) @binding(2) var<storage, read_write> weights: array<u32>;
@group(0) @binding(5) var<storage, read_write> scales: array<Lanes>; // [rows / 32 upwards, width]

const EACH: u32 = 32u / BITS; // weights of a word

// The word that weight i is in, with that weight lowest.
fn word_from(i: u32) -> i32 { return bitcast<i32>(weights[i / EACH] >> (i % EACH * BITS)); }

fn weight(row: u32, column: u32) -> f32 {
    let q = extractBits(word_from(row * sizes.width + column), 0u, BITS);
    let at = row / 32u * sizes.width + column;
    return f32(q) * vec4<f32>(scales[at / WIDTH])[at % WIDTH];
}

// Four neighbours of a row, which lie in one word.
fn weight4(row: u32, column: u32) -> vec4<f32> {
    if WIDTH == 1u { return weight_by_weight(row, column); }
    let word = word_from(row * sizes.width + column);
    let q = vec4<i32>(
        extractBits(word, 0u, BITS), extractBits(word, BITS, BITS),
        extractBits(word, 2u * BITS, BITS), extractBits(word, 3u * BITS, BITS),
    );
    return vec4<f32>(q) * vec4<f32>(scales[(row / 32u * sizes.width + column) / WIDTH]);
}
