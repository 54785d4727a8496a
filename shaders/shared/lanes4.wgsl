// Four elements at a time: widths that are multiples of 4, which nearly all are. See lanes1.wgsl.

alias Lanes = vec4<f32>;
const WIDTH: u32 = 4u;

fn pick(quad: vec4<f32>, unit: u32) -> Lanes { return quad; }
fn sum_lanes(v: Lanes) -> f32 { return (v.x + v.y) + (v.z + v.w); }
fn first_lane(v: Lanes) -> f32 { return v.x; }

// s + a . b, by fused multiply-adds: not every compiler makes them of * and +.
fn dot_add(a: Lanes, b: Lanes, s: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, s))));
}
