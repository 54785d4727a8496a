// The right side of the forward product: a place's matrix as it is stored, [inner, columns].

// Four channels of a quad of columns of a slice: which of them a thread fetches. Neighbours read
// neighbouring columns.
fn fetched_by(thread: u32, depth: u32, columns: u32) -> vec2<u32> {
    return vec2<u32>(4u * (thread / (columns / 4u)), thread % (columns / 4u));
}

fn forward4(place: u32, channel: u32, column: u32) -> vec4<f32> {
    if channel >= sizes.inner || column >= sizes.columns { return vec4<f32>(); }
    return weight4(place * sizes.inner + channel, column);
}

fn weights4x4(place: u32, c: u32, column: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        forward4(place, c, column), forward4(place, c + 1u, column),
        forward4(place, c + 2u, column), forward4(place, c + 3u, column),
    );
}
