//! Counter-based Gaussian noise: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, the CPU
//! twin of `shaders/shared/philox.wgsl`. A number depends on (seed, stream, image, step, element)
//! and on nothing else, so a rollout replays in any batch layout and step noise is never stored.
//!
//! Key = the two halves of the seed; counter = (element / 4, step, image, stream). WGSL promises
//! little of its own `log`, `sin` and `cos`, so both sides use the polynomials below; each normal
//! is within 2e-6 of the f64 formula.

/// What a number is for; streams never share counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// The initial latent; the image number is the group's first where a group shares it.
    InitialNoise = 0,
    /// The noise of one sampler step.
    StepNoise = 1,
    /// The prompts of an epoch; the image number is the epoch.
    Prompts = 2,
    /// LoRA's A matrices; the image number is the layer.
    LoraInit = 3,
    /// The trained steps of an epoch; the image number is the epoch.
    TrainSteps = 4,
    /// The latents of `sample` and of the fixed evaluation grid.
    Evaluation = 5,
    /// The pictures that a distance is measured on; the image number is the subset.
    DistanceSubsets = 6,
    /// The prompts of a bootstrap's resample; the image number is the resample.
    Bootstrap = 7,
}

/// Philox4x32-10: ten rounds over a counter of four words with a key of two.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let p0 = u64::from(0xD251_1F53u32) * u64::from(c[0]);
        let p1 = u64::from(0xCD9E_8D57u32) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
    }
    c
}

/// The key that belongs to a seed.
pub fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Four raw words for (stream, image, step, quad).
pub fn words(seed: u64, stream: Stream, image: u32, step: u32, quad: u32) -> [u32; 4] {
    philox(key(seed), [quad, step, image, stream as u32])
}

/// Natural logarithm of `x` in (0, 1], by exponent and an odd polynomial of (m - 1) / (m + 1);
/// absolute error < 5e-7.
fn log(x: f32) -> f32 {
    // The mantissa is brought into [sqrt(1/2), sqrt(2)) so that the polynomial's argument stays
    // within 0.172.
    let bits = x.to_bits();
    let e = (bits.wrapping_sub(0x3F35_04F3) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((e << 23) as u32));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let p = s * (2.0 + z * (0.666_666_6 + z * (0.400_002_5 + z * 0.284_987_9)));
    e as f32 * std::f32::consts::LN_2 + p
}

/// (sin, cos) of 2 pi (u / 2^32): the quadrant from the top bits, Taylor polynomials on [-pi/4,
/// pi/4].
fn sin_cos_turn(u: u32) -> (f32, f32) {
    let quadrant = u.wrapping_add(0x2000_0000) >> 30;
    let r = u.wrapping_sub(quadrant << 30) as i32;
    // r is a signed fraction of a turn in [-1/8, 1/8); 24 bits keep the conversion exact.
    let a = (r >> 6) as f32 * (std::f32::consts::TAU / 67_108_864.0);
    let z = a * a;
    let s = a
        * (1.0
            + z * (-1.666_666_7e-1 + z * (8.333_333e-3 + z * (-1.984_127e-4 + z * 2.755_732e-6))));
    let c = 1.0 + z * (-0.5 + z * (4.166_666_6e-2 + z * (-1.388_888_9e-3 + z * 2.480_158_7e-5)));
    match quadrant {
        0 => (s, c),
        1 => (c, -s),
        2 => (-s, -c),
        _ => (-c, s),
    }
}

/// Two standard normals from two words. The radius uses 23 bits plus one half, so that it is never
/// infinite.
pub fn box_muller(u: u32, v: u32) -> [f32; 2] {
    let radius = (-2.0 * log(((u >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0))).max(0.0).sqrt();
    let (s, c) = sin_cos_turn(v);
    [radius * c, radius * s]
}

/// Four standard normals for (stream, image, step, quad).
pub fn normals(seed: u64, stream: Stream, image: u32, step: u32, quad: u32) -> [f32; 4] {
    let [a, b, c, d] = words(seed, stream, image, step, quad);
    let ([x, y], [z, w]) = (box_muller(a, b), box_muller(c, d));
    [x, y, z, w]
}

/// `n` standard normals for (stream, image, step), element by element.
pub fn noise(seed: u64, stream: Stream, image: u32, step: u32, n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(n + 3);
    for quad in 0..n.div_ceil(4) as u32 {
        out.extend(normals(seed, stream, image, step, quad));
    }
    out.truncate(n);
    out
}

/// Distinct indices below `n`, `k` of them, in the order drawn (partial Fisher-Yates).
pub fn choose(seed: u64, stream: Stream, image: u32, n: usize, k: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    for i in 0..k.min(n) {
        let word = words(seed, stream, image, 0, i as u32)[0];
        let j = i + ((u64::from(word) * (n - i) as u64) >> 32) as usize;
        all.swap(i, j);
    }
    all.truncate(k);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Known answers of Salmon et al.'s Random123, philox4x32-10.
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = philox(
            [0xa409_3822, 0x299f_31d0],
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn normals_are_within_2e_6_of_f64_and_standard() {
        let mut worst = 0f64;
        for quad in 0..50_000 {
            let w = words(9, Stream::StepNoise, 3, 1, quad);
            for pair in [[w[0], w[1]], [w[2], w[3]]] {
                let u = (f64::from(pair[0] >> 9) + 0.5) / 8_388_608.0;
                let angle = std::f64::consts::TAU * f64::from(pair[1]) / 4_294_967_296.0;
                let radius = (-2.0 * u.ln()).sqrt();
                let [x, y] = box_muller(pair[0], pair[1]);
                worst = worst
                    .max((f64::from(x) - radius * angle.cos()).abs())
                    .max((f64::from(y) - radius * angle.sin()).abs());
            }
        }
        assert!(worst < 2e-6, "{worst:e}");
        let z = noise(9, Stream::StepNoise, 3, 1, 400_000);
        let moment = |k: i32| z.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / z.len() as f64;
        assert!(
            moment(1).abs() < 0.01
                && (moment(2) - 1.0).abs() < 0.01
                && (moment(4) - 3.0).abs() < 0.06
        );
    }

    #[test]
    fn normals_match_the_committed_vectors() {
        let golden: Vec<f32> =
            serde_json::from_str(include_str!("../tests/golden/philox.json")).unwrap();
        let found = noise(0x0123_4567_89ab_cdef, Stream::StepNoise, 1000, 5, golden.len());
        // f64 numbers of tests/golden/make_philox.py, an independent implementation.
        assert!(
            golden.iter().zip(&found).all(|(a, b)| (a - b).abs() < 2e-6),
            "regenerate with tests/golden/make_philox.py?"
        );
    }
}
