// A number of the inner tile by its column, where Lanes are one. Follows lanes1.wgsl.

alias Held = Single;

fn hold(v: Lanes) -> Held { return hold1(v); }

fn inner_element(i: u32, column: u32) -> f32 {
    return f32(inner_tile[i * STRIDE + column]);
}
