// Weights [rows, width] in f16, two a word, the first in the low half. Rows of an odd width start
// in the middle of a word.

@group(0) @binding(2) var<storage, read_write> weights: array<u32>;

fn weight(row: u32, column: u32) -> f32 {
    let i = row * sizes.width + column;
    return unpack2x16float(weights[i / 2u])[i % 2u];
}

// Four neighbours of a row: two words where rows start with a word.
fn weight4(row: u32, column: u32) -> vec4<f32> {
    if WIDTH == 1u { return weight_by_weight(row, column); }
    let i = (row * sizes.width + column) / 2u;
    return vec4<f32>(unpack2x16float(weights[i]), unpack2x16float(weights[i + 1u]));
}
