//! Loops that the compiler makes vectors of, for the widest that the processor has, and functions
//! for their bodies: polynomials without branches, fitted by reweighted least squares.

/// Runs a loop with the processor's widest vectors, found at run time.
#[inline(always)]
pub fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// e^x to 1.2e-7 of it; from -87 downwards e^-87, from 88 upwards e^88; NaN stays.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // log 2 in two parts: the first has zeros at its end, so that a multiple of it is exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding it leaves an integer in the lowest bits.
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LOW, n.mul_add(-HIGH, x));
    let p = r.mul_add(1.381_453_9e-3, 8.368_745e-3);
    let p = p.mul_add(r, 4.166_839e-2).mul_add(r, 0.166_665_21).mul_add(r, 0.499_999_94);
    let p = (r * r).mul_add(p, r) + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh to 2.5e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    2.0f32.mul_add(sigmoid(2.0 * x), -1.0)
}

/// erf to 2.5e-7: a + a p(a^2) up to 1, and 1 - e^-q(a) beyond.
#[inline(always)]
pub fn erf(a: f32) -> f32 {
    let s = a * a;
    let p = s.mul_add(7.854_01e-5, -8.010_242e-4).mul_add(s, 5.188_334e-3);
    let p = p.mul_add(s, -2.685_381_7e-2).mul_add(s, 0.112_835_854);
    let p = p.mul_add(s, -0.376_126_26).mul_add(s, 0.128_379_17);
    let near = a.mul_add(p, a);
    // NaN stays, as it does not in `min`.
    let t = if a.abs() > 4.0 { 4.0 } else { a.abs() };
    let q = t.mul_add(2.168_685e-5, -4.413_363_6e-4).mul_add(t, 4.204_562e-3);
    let q = q.mul_add(t, -2.520_825_7e-2).mul_add(t, 0.108_418_58).mul_add(t, 0.633_219_9);
    let q = q.mul_add(t, 1.129_578_5).mul_add(t, -1.880_402_3e-4);
    let far = (1.0 - exp(-q)).copysign(a);
    if a.abs() <= 1.0 { near } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of a function over a range, against f64.
    fn error(range: std::ops::Range<f32>, f: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let n = 200_000;
        let at = |i: usize| range.start + (range.end - range.start) * i as f32 / n as f32;
        let off = |x: f32| {
            let exact = exact(f64::from(x));
            (f64::from(f(x)) - exact).abs() / exact.abs().max(1.0)
        };
        (0..n).map(|i| off(at(i))).fold(0.0, f64::max)
    }

    #[test]
    fn the_functions_are_within_their_stated_errors() {
        let within = |name: &str, found: f64, stated: f64| {
            assert!(found < stated, "{name}: off by {found:e}, {stated:e} stated");
        };
        within("exp", error(-80.0..0.0, exp, f64::exp), 1.2e-7);
        within("exp of more", error(0.0..87.0, exp, f64::exp), 1.2e-7);
        within("sigmoid", error(-20.0..20.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp())), 2e-7);
        within("tanh", error(-20.0..20.0, tanh, f64::tanh), 2.5e-7);
        within("erf", error(-4.9..4.9, erf, series), 2.5e-7);
    }

    /// erf by its series, which has digits enough up to 5.
    fn series(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    /// What diverged must not look sound.
    #[test]
    fn nan_stays_nan() {
        for f in [exp, sigmoid, tanh, erf] {
            assert!(f(f32::NAN).is_nan());
        }
        assert!(exp(f32::INFINITY) > 1e38 && exp(f32::NEG_INFINITY) < 1e-37);
    }
}
