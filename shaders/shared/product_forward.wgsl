// The right side of the forward product: a place's matrix as it is stored, [inner, columns].
// Neighbouring threads read neighbouring columns: a thread has one quad of every fourth channel.

fn forward4(place: u32, channel: u32, column: u32) -> vec4<f32> {
    if channel >= sizes.inner || column >= sizes.columns { return vec4<f32>(); }
    return weight4(place * sizes.inner + channel, column);
}

fn fetch_weights(place: u32, first: u32, first_column: u32, thread: u32) -> mat4x4<f32> {
    let c = first + thread / 16u;
    let column = first_column + 4u * (thread % 16u);
    return mat4x4<f32>(
        forward4(place, c, column), forward4(place, c + 4u, column),
        forward4(place, c + 8u, column), forward4(place, c + 12u, column),
    );
}

fn store_weights(m: mat4x4<f32>, thread: u32) {
    let depth = thread / 16u;
    let quad = thread % 16u;
    right[at(depth, quad)] = m[0]; right[at(depth + 4u, quad)] = m[1];
    right[at(depth + 8u, quad)] = m[2]; right[at(depth + 12u, quad)] = m[3];
}
