// The activations of networks and their slopes. Kinds: 0 silu, 1 gelu, 2 gelu by tanh, 3 quick
// gelu, 4 relu. Kept in sync with the program's list.

// gelu by tanh is x (1 + tanh(u)) / 2 = x sigmoid(2 u).
const TANH_GELU: f32 = 1.5957691216057308; // 2 sqrt(2 / pi)

// Beyond it the slopes are 0 or 1 in f32; a product of infinity and 0 would be neither.
const FAR: f32 = 60.0;

fn twice_u(x: Lanes) -> Lanes { return TANH_GELU * (x + 0.044715 * x * x * x); }

fn activation(kind: u32, x: Lanes) -> Lanes {
    switch kind {
        case 0u: { return x * sigmoid(x); }
        case 1u: { return gelu(x); }
        case 2u: { return x * sigmoid(twice_u(x)); }
        case 3u: { return x * sigmoid(1.702 * x); }
        default: { return max(x, Lanes()); }
    }
}

// The slope of x sigmoid(z) from z and x dz/dx. s (1 - s) is made without a difference, which would
// lose what x dz/dx, large where s is nearly 1, then brings to light.
fn gated_slope(z: Lanes, x_dz: Lanes) -> Lanes {
    let e = exp(-abs(z));
    let r = 1.0 / (1.0 + e);
    return select(e, Lanes(1.0), z >= Lanes()) * r + x_dz * (e * r * r);
}

fn activation_slope(kind: u32, x: Lanes) -> Lanes {
    switch kind {
        case 0u: { return gated_slope(x, x); }
        case 1u: { return gelu_slope(x); }
        case 2u: {
            let c = clamp(x, Lanes(-FAR), Lanes(FAR));
            return gated_slope(twice_u(c), TANH_GELU * (c + 0.134145 * c * c * c));
        }
        case 3u: {
            let z = 1.702 * clamp(x, Lanes(-FAR), Lanes(FAR));
            return gated_slope(z, z);
        }
        default: { return select(Lanes(), Lanes(1.0), x > Lanes()); }
    }
}
