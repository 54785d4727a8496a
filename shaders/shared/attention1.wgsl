// A number of the inner tile by its column, where Lanes are one. Follows lanes1.wgsl.

fn inner_element(i: u32, column: u32) -> f32 { return inner_tile[i * STRIDE + column]; }
