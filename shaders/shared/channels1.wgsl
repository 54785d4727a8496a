// Channels that are no multiples of 4: buffers are read and written one number at a time. See
// channels4.wgsl.

alias Lanes = f32;
const WIDTH: u32 = 1u;

fn channel(row: u32, c: u32) -> f32 {
    if c >= sizes.inner { return 0.0; }
    return source[row * sizes.inner + c];
}

fn channels4(row: u32, c: u32) -> vec4<f32> {
    if row == NONE { return vec4<f32>(); }
    return vec4<f32>(
        channel(row, c), channel(row, c + 1u), channel(row, c + 2u), channel(row, c + 3u),
    );
}

fn weight_or_zero(row: u32, column: u32) -> f32 {
    if column >= sizes.width { return 0.0; }
    return weight(row, column);
}

// What weight4 is where four neighbours may end beyond the row.
fn weight_by_weight(row: u32, column: u32) -> vec4<f32> {
    return vec4<f32>(
        weight_or_zero(row, column), weight_or_zero(row, column + 1u),
        weight_or_zero(row, column + 2u), weight_or_zero(row, column + 3u),
    );
}

fn write4(row: u32, column: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i += 1u) {
        if column + i >= sizes.columns { return; }
        let at = row * sizes.columns + column + i;
        var value = sizes.factor * values[i];
        if sizes.has_bias == 1u { value += bias[column + i]; }
        if sizes.adds == 1u { value += out[at]; }
        out[at] = value;
    }
}
