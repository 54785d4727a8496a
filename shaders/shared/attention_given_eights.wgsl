// How attention_eights.wgsl reads attention_given.wgsl.

fn four_g(at: vec4<u32>, d: u32) -> vec4<f32> {
    return hold4(vec4<f32>(g[at.x + d], g[at.y + d], g[at.z + d], g[at.w + d]));
}
