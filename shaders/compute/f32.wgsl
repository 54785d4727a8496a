// What products take: numbers as they are.

alias Single = f32;
alias Quad = vec4<f32>;

fn hold1(v: f32) -> Single { return v; }
fn hold4(v: vec4<f32>) -> Quad { return v; }
