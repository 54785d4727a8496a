// A number of the inner tile by its column, where Lanes are four. Follows lanes4.wgsl.

fn inner_element(i: u32, column: u32) -> f32 {
    return inner_tile[i * STRIDE + column / 4u][column % 4u];
}
