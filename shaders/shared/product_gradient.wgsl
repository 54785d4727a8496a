// The right side of the gradient's product: a place's matrix transposed, its rows being columns of
// the result. Four neighbouring threads read the 16 channels of a row, and each turns a block of
// four rows.

fn gradient4(place: u32, channel: u32, column: u32) -> vec4<f32> {
    if channel >= sizes.inner || column >= sizes.columns { return vec4<f32>(); }
    return weight4(place * sizes.columns + column, channel);
}

fn fetch_weights(place: u32, first: u32, first_column: u32, thread: u32) -> mat4x4<f32> {
    let c = first + 4u * (thread % 4u);
    let column = first_column + 4u * (thread / 4u);
    return transpose(mat4x4<f32>(
        gradient4(place, c, column), gradient4(place, c, column + 1u),
        gradient4(place, c, column + 2u), gradient4(place, c, column + 3u),
    ));
}

fn store_weights(m: mat4x4<f32>, thread: u32) {
    let depth = 4u * (thread % 4u);
    let quad = thread / 4u;
    right[at(depth, quad)] = m[0]; right[at(depth + 1u, quad)] = m[1];
    right[at(depth + 2u, quad)] = m[2]; right[at(depth + 3u, quad)] = m[3];
}
