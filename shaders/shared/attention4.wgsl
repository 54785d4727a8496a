// A number of the inner tile by its column, where Lanes are four. Follows lanes4.wgsl.

alias Held = Quad;

fn hold(v: Lanes) -> Held { return hold4(v); }

fn inner_element(i: u32, column: u32) -> f32 {
    return f32(inner_tile[i * STRIDE + column / 4u][column % 4u]);
}
