// Weights [rows, width] in 4 bits with their sign, eight a word, the first in the lowest bits. In
// each column 32 rows share a scale.

@group(0) @binding(2) var<storage, read_write> weights: array<u32>;
@group(0) @binding(5) var<storage, read_write> scales: array<Lanes>; // [rows / 32 upwards, width]

fn weight(row: u32, column: u32) -> f32 {
    let i = row * sizes.width + column;
    let q = extractBits(bitcast<i32>(weights[i / 8u]), i % 8u * 4u, 4u);
    let at = row / 32u * sizes.width + column;
    return f32(q) * vec4<f32>(scales[at / WIDTH])[at % WIDTH];
}

// Four neighbours of a row: one word where rows start with half a word.
fn weight4(row: u32, column: u32) -> vec4<f32> {
    if WIDTH == 1u { return weight_by_weight(row, column); }
    let i = row * sizes.width + column;
    let word = bitcast<i32>(weights[i / 8u]) >> (i % 8u * 4u);
    let q = vec4<i32>(
        extractBits(word, 0u, 4u), extractBits(word, 4u, 4u),
        extractBits(word, 8u, 4u), extractBits(word, 12u, 4u),
    );
    return vec4<f32>(q) * vec4<f32>(scales[(row / 32u * sizes.width + column) / WIDTH]);
}
