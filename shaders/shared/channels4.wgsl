// Channels of both sides that are multiples of 4: buffers are read and written four numbers at a
// time.

alias Lanes = vec4<f32>;
const WIDTH: u32 = 4u;

// Four neighbouring channels of a row of the source; zeros beyond the image and the channels.
fn channels4(row: u32, c: u32) -> vec4<f32> {
    if row == NONE || c >= sizes.inner { return vec4<f32>(); }
    return source[(row * sizes.inner + c) / 4u];
}

// Never called: here all four neighbours of a row are in it.
fn weight_by_weight(row: u32, column: u32) -> vec4<f32> { return vec4<f32>(); }

fn write4(row: u32, column: u32, values: vec4<f32>) {
    if column >= sizes.columns { return; }
    let at = (row * sizes.columns + column) / 4u;
    var value = sizes.factor * values;
    if sizes.has_bias == 1u { value += bias[column / 4u]; }
    if sizes.adds == 1u { value += out[at]; }
    out[at] = value;
}
