// The right side of the gradient's product: a place's matrix transposed, its rows being columns of
// the result.

// Four channels of a quad of columns of a slice: which of them a thread fetches. Neighbours read
// the slice's channels of a row.
fn fetched_by(thread: u32, depth: u32, columns: u32) -> vec2<u32> {
    return vec2<u32>(4u * (thread % (depth / 4u)), thread / (depth / 4u));
}

fn gradient4(place: u32, channel: u32, column: u32) -> vec4<f32> {
    if channel >= sizes.inner || column >= sizes.columns { return vec4<f32>(); }
    return weight4(place * sizes.columns + column, channel);
}

fn weights4x4(place: u32, c: u32, column: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        gradient4(place, c, column), gradient4(place, c, column + 1u),
        gradient4(place, c, column + 2u), gradient4(place, c, column + 3u),
    ));
}
