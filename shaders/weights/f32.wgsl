// Weights [rows, width] in f32.

@group(0) @binding(2) var<storage, read_write> weights: array<Lanes>;

fn weight(row: u32, column: u32) -> f32 {
    let i = row * sizes.width + column;
    return vec4<f32>(weights[i / WIDTH])[i % WIDTH];
}

// Four neighbours of a row.
fn weight4(row: u32, column: u32) -> vec4<f32> {
    if WIDTH == 1u { return weight_by_weight(row, column); }
    return vec4<f32>(weights[(row * sizes.width + column) / WIDTH]);
}
