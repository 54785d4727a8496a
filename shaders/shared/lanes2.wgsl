// Even widths that are no multiples of 4 (groups of 10 or 30 channels): two elements at a time. See
// lanes4.wgsl.

alias Lanes = vec2<f32>;
const WIDTH: u32 = 2u;

fn sum_lanes(v: Lanes) -> f32 { return v.x + v.y; }
fn first_lane(v: Lanes) -> f32 { return v.x; }
fn dot_add(a: Lanes, b: Lanes, s: f32) -> f32 { return fma(a.y, b.y, fma(a.x, b.x, s)); }
