// What products take: f32 rounded to what f16 holds, where nothing is kept in memory.

alias Single = f32;
alias Quad = vec4<f32>;

fn hold1(v: f32) -> Single { return quantizeToF16(clamp(v, -65504.0, 65504.0)); }
fn hold4(v: vec4<f32>) -> Quad {
    return quantizeToF16(clamp(v, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
}
