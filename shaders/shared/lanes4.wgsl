// Four elements at a time: latents whose dimension is a multiple of 4, which nearly all are. See
// lanes1.wgsl.

alias Lanes = vec4<f32>;
const WIDTH: u32 = 4u;

fn pick(quad: vec4<f32>, unit: u32) -> Lanes { return quad; }
fn sum_lanes(v: Lanes) -> f32 { return (v.x + v.y) + (v.z + v.w); }
