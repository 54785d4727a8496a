// One element at a time, for widths that are no multiple of 4: the same kernels with f32 in place
// of vec4. In the hot path each element draws its quad of noise and picks its own.

alias Lanes = f32;
const WIDTH: u32 = 1u;

fn pick(quad: vec4<f32>, unit: u32) -> Lanes { return quad[unit & 3u]; }
fn sum_lanes(v: Lanes) -> f32 { return v; }
fn first_lane(v: Lanes) -> f32 { return v; }
fn dot_add(a: Lanes, b: Lanes, s: f32) -> f32 { return fma(a, b, s); }
