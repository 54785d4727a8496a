// What products take: f16, half the memory of a workgroup; sums are f32. What f16 cannot hold
// becomes the largest that it can.

enable f16;

alias Single = f16;
alias Quad = vec4<f16>;

fn hold1(v: f32) -> Single { return f16(clamp(v, -65504.0, 65504.0)); }
fn hold4(v: vec4<f32>) -> Quad {
    return vec4<f16>(clamp(v, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
}
