// Philox4x32-10 and Box-Muller; kept in sync with src/philox.rs, which explains the polynomials.
// A part of every shader that draws noise.

// The 64-bit product of two words from their halves: (high, low).
fn mul_wide(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xFFFFu; let a1 = a >> 16u;
    let b0 = b & 0xFFFFu; let b1 = b >> 16u;
    let low = a0 * b0;
    let mid = a1 * b0 + (low >> 16u);
    let mid2 = a0 * b1 + (mid & 0xFFFFu);
    return vec2<u32>(a1 * b1 + (mid >> 16u) + (mid2 >> 16u), (mid2 << 16u) | (low & 0xFFFFu));
}

fn philox_round(c: vec4<u32>, k: vec2<u32>) -> vec4<u32> {
    let p0 = mul_wide(0xD2511F53u, c.x);
    let p1 = mul_wide(0xCD9E8D57u, c.z);
    return vec4<u32>(p1.x ^ c.y ^ k.x, p1.y, p0.x ^ c.w ^ k.y, p0.y);
}

// Ten rounds, written out: a loop costs software Vulkan more than its body.
fn philox(key: vec2<u32>, counter: vec4<u32>) -> vec4<u32> {
    let w = vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    var c = philox_round(counter, key);
    c = philox_round(c, key + w);
    c = philox_round(c, key + 2u * w);
    c = philox_round(c, key + 3u * w);
    c = philox_round(c, key + 4u * w);
    c = philox_round(c, key + 5u * w);
    c = philox_round(c, key + 6u * w);
    c = philox_round(c, key + 7u * w);
    c = philox_round(c, key + 8u * w);
    return philox_round(c, key + 9u * w);
}

fn log_unit(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let e = bitcast<i32>(bits - 0x3F3504F3u) >> 23u;
    let m = bitcast<f32>(bits - bitcast<u32>(e << 23u));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let p = s * (2.0 + z * (0.6666666 + z * (0.4000025 + z * 0.2849879)));
    return f32(e) * 0.6931472 + p;
}

// (sin, cos) of a fraction u / 2^32 of a turn.
fn sin_cos_turn(u: u32) -> vec2<f32> {
    let quadrant = (u + 0x20000000u) >> 30u;
    let r = bitcast<i32>(u - (quadrant << 30u));
    let a = f32(r >> 6u) * (6.2831855 / 67108864.0);
    let z = a * a;
    let s =
        a * (1.0 + z * (-1.6666667e-1 + z * (8.333333e-3 + z * (-1.984127e-4 + z * 2.755732e-6))));
    let c = 1.0 + z * (-0.5 + z * (4.1666666e-2 + z * (-1.3888889e-3 + z * 2.4801587e-5)));
    // By selection, not by branches: all threads of a group take all branches anyway.
    let odd = (quadrant & 1u) == 1u;
    let sin_sign = select(1.0, -1.0, quadrant >= 2u);
    let cos_sign = select(1.0, -1.0, quadrant == 1u || quadrant == 2u);
    return vec2<f32>(sin_sign * select(s, c, odd), cos_sign * select(c, s, odd));
}

fn box_muller(u: u32, v: u32) -> vec2<f32> {
    let radius = sqrt(max(-2.0 * log_unit((f32(u >> 9u) + 0.5) * (1.0 / 8388608.0)), 0.0));
    let sc = sin_cos_turn(v);
    return vec2<f32>(radius * sc.y, radius * sc.x);
}

// Four standard normals for (stream, image, step, element / 4).
fn normals(seed: vec2<u32>, stream: u32, image: u32, step: u32, quad: u32) -> vec4<f32> {
    let w = philox(seed, vec4<u32>(quad, step, image, stream));
    return vec4<f32>(box_muller(w.x, w.y), box_muller(w.z, w.w));
}

// The noise of one unit of WIDTH elements.
fn draw(sample: u32, unit: u32) -> Lanes {
    let key = vec2<u32>(params.key_lo, params.key_hi);
    let image = params.first_image + sample;
    return pick(normals(key, params.stream, image, params.step, unit * WIDTH / 4u), unit);
}
