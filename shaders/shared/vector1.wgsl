// Widths that are no multiples of 4: one element at a time. See vector4.wgsl.

alias Lanes = f32;
const WIDTH: u32 = 1u;

fn sum_lanes(v: Lanes) -> f32 { return v; }
fn first_lane(v: Lanes) -> f32 { return v; }
fn dot_add(a: Lanes, b: Lanes, s: f32) -> f32 { return fma(a, b, s); }
