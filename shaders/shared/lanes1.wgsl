// One element at a time, for dimensions that are no multiple of 4: the same kernels with f32 in
// place of vec4, where each element draws its quad of noise and picks its own.

alias Lanes = f32;
const WIDTH: u32 = 1u;

fn pick(quad: vec4<f32>, unit: u32) -> Lanes { return quad[unit & 3u]; }
fn sum_lanes(v: Lanes) -> f32 { return v; }
