//! Numbers about sets of pictures, against scipy, closed forms and simulated Gaussians.

use std::time::{Duration, Instant};

use pcpo_wgpu::measure::bootstrap::{interval, standard_error};
use pcpo_wgpu::measure::distances::{cmmd, frechet, frechet_infinity, kid};
use pcpo_wgpu::measure::diversity::{over_prompts, pairwise_cosine_distance, vendi};
use pcpo_wgpu::measure::pixels::PixelStatistics;
use pcpo_wgpu::philox::{Stream, noise};
use serde_json::Value;

/// A set of features, one row a picture.
type Rows = Vec<Vec<f32>>;

const REGENERATE: &str = "regenerate with tests/golden/measure/make_measure_golden.py?";

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/measure/measure.json")).unwrap()
}

fn rows(value: &Value) -> Rows {
    serde_json::from_value(value.clone()).unwrap()
}

fn slices(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(Vec::as_slice).collect()
}

/// A number against the golden one, to 1e-6 of it.
fn agrees(found: Option<f64>, golden: &Value, name: &str) {
    let golden = golden.as_f64().unwrap();
    let found = found.unwrap_or_else(|| panic!("{name}: no number, not {golden}"));
    let near = (found - golden).abs() <= 1e-6 * golden.abs();
    assert!(near, "{name}: {found}, not {golden}; {REGENERATE}");
}

/// A number against a closed form.
fn is(found: Option<f64>, expected: f64, tolerance: f64) {
    let found = found.unwrap();
    assert!((found - expected).abs() <= tolerance, "{found}, not {expected}");
}

/// `n` rows of N(0, I_d), of a draw that the number names.
fn gaussian(number: u32, n: usize, d: usize) -> Rows {
    noise(5, Stream::StepNoise, number, 0, n * d).chunks(d).map(<[f32]>::to_vec).collect()
}

/// `n` pairwise orthogonal rows of norm `norm`.
fn orthogonal(n: usize, norm: f32) -> Rows {
    let row = |i: usize| (0..n).map(|j| if i == j { norm } else { 0.0 }).collect();
    (0..n).map(row).collect()
}

/// Rows of n pictures whose pairs all have the cosine `c`: a shared axis and one of its own each.
fn equal_cosines(n: usize, c: f32) -> Rows {
    let row = |own: Vec<f32>| [&[c.sqrt()], &own[..]].concat();
    orthogonal(n, (1.0 - c).sqrt()).into_iter().map(row).collect()
}

#[test]
fn distances_match_scipy() {
    for case in golden()["distances"].as_array().unwrap() {
        let (a, b) = (rows(&case["a"]), rows(&case["b"]));
        let name = |measure: &str| format!("{measure}, {}", case["name"]);
        for (a, b) in [(&a, &b), (&b, &a)] {
            agrees(frechet(a, b), &case["frechet"], &name("FD"));
            agrees(kid(a, b), &case["kid"], &name("KID"));
            agrees(cmmd(a, b), &case["cmmd"], &name("CMMD"));
        }
    }
}

#[test]
fn distances_have_their_closed_forms() {
    // Five points of mean 0 and unbiased covariance diag(1, 4), moved and turned.
    let points = [[1f32, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]];
    let a: Rows = points.iter().map(|[x, y]| vec![*x, y + 1.0]).collect();
    let b: Rows = points.iter().map(|[x, y]| vec![y + 1.0, x + 1.0]).collect();
    is(frechet(&a, &b), 3.0, 1e-12);
    is(kid(&orthogonal(2, 1.0), &[vec![1.0, 1.0], vec![0.0, 0.0]]), -2.375, 1e-12);

    // Lengths do not matter: rows are divided by their norms.
    let axes = orthogonal(2, 3.0);
    let [e1, e2] = [&axes[..1], &axes[1..]];
    is(cmmd(e1, e2), 19.900332502, 1e-9);
    let twice = [e1, e1].concat();
    is(cmmd(&twice, &axes), 4.975083125, 1e-9);
}

#[test]
fn equal_sets_are_at_distance_zero() {
    for (n, d) in [(40, 6), (6, 40)] {
        let a = gaussian(0, n, d);
        // FD is a difference of traces near 2 d.
        is(frechet(&a, &a), 0.0, 1e-11 * d as f64);
        is(cmmd(&a, &a), 0.0, 1e-10);
        let copies = vec![a[0].clone(); n];
        is(frechet(&copies, &copies), 0.0, 0.0);
    }
}

/// d/N + d(d+1)/(4(N-1)), twice: METHOD's bias between two samples of one Gaussian.
fn bias(d: f64, n: f64) -> f64 {
    2.0 * (d / n + d * (d + 1.0) / (4.0 * (n - 1.0)))
}

#[test]
fn frechet_has_the_bias_of_finite_samples() {
    let cases = [(16, 1024, 0.169, 0.164), (32, 256, 2.346, 2.321), (64, 512, 4.368, 4.320)];
    for (d, n, simulated, formula) in cases {
        let pairs = 4u32;
        let distance =
            |i: u32| frechet(&gaussian(2 * i, n, d), &gaussian(2 * i + 1, n, d)).unwrap();
        let found = (0..pairs).map(distance).sum::<f64>() / f64::from(pairs);
        assert!((bias(d as f64, n as f64) - formula).abs() < 0.001, "{d} {n}");
        assert!((found / simulated - 1.0).abs() < 0.04, "{d} {n}: {found}, not {simulated}");
    }
}

#[test]
fn frechet_infinity_takes_the_bias_away() {
    let (d, n, m) = (16, 400, 4000);
    let reference = gaussian(100, m, d);
    // What the reference's own size leaves.
    let left = bias(d as f64, m as f64) / 2.0;
    let (mut plain, mut extrapolated) = (0.0, 0.0);
    for i in 0..6 {
        let evaluated = gaussian(i, n, d);
        plain += frechet(&evaluated, &reference).unwrap() / 6.0;
        extrapolated += frechet_infinity(&evaluated, &reference, i.into()).unwrap() / 6.0;
    }
    let (far, near) = ((plain - left).abs(), (extrapolated - left).abs());
    assert!(near < 0.25 * far, "{extrapolated} and {plain}, truth {left}");
}

#[test]
fn frechet_infinity_is_the_intercept_over_1_by_n() {
    // Any two of the three rows are at one distance from the reference, so that it does not matter
    // which are drawn: the line goes through FD_2 at 1/2 and FD_3 at 1/3.
    let evaluated = orthogonal(3, 2.0);
    let reference = [orthogonal(3, 1.0), vec![vec![1.0; 3]]].concat();
    let of = |n: usize| frechet(&evaluated[..n], &reference).unwrap();
    let expected = 3.0 * of(3) - 2.0 * of(2);
    assert!((of(3) - expected).abs() > 0.1, "a case that extrapolates nothing");
    for seed in 0..4 {
        is(frechet_infinity(&evaluated, &reference, seed), expected, 1e-10);
    }

    // Of four rows the sizes are 2, 3 and 4, each once: the weights of least squares at 1/2, 1/3
    // and 1/4 are -51, 27 and 66 over 42.
    let evaluated = orthogonal(4, 2.0);
    let reference = [orthogonal(4, 1.0), vec![vec![1.0; 4]]].concat();
    let of = |n: usize| frechet(&evaluated[..n], &reference).unwrap();
    let expected = (-51.0 * of(2) + 27.0 * of(3) + 66.0 * of(4)) / 42.0;
    is(frechet_infinity(&evaluated, &reference, 0), expected, 1e-10);

    let (evaluated, reference) = (gaussian(0, 60, 5), gaussian(1, 60, 5));
    let of = |seed| frechet_infinity(&evaluated, &reference, seed).unwrap();
    assert_eq!(of(1).to_bits(), of(1).to_bits());
    assert_ne!(of(1), of(2), "the seed draws the subsets");
    let copies = vec![vec![1.0, 2.0]; 30];
    let line = [vec![0.0, 0.0], vec![2.0, 0.0]];
    is(frechet_infinity(&copies, &line, 0), 6.0, 1e-12);
}

/// Sums over pairs as they are written, without blocks.
fn mean_kernel(a: &Rows, b: &Rows, kernel: fn(&[f32], &[f32]) -> f64, equal: bool) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            if equal || i != j {
                sum += kernel(x, y);
                count += 1;
            }
        }
    }
    sum / f64::from(count)
}

#[test]
fn kernel_distances_count_each_pair_of_many_rows_once() {
    let (a, mut b) = (gaussian(0, 1100, 3), gaussian(1, 530, 3));
    b.iter_mut().for_each(|row| row[0] += 0.5);
    fn dot(x: &[f32], y: &[f32]) -> f64 {
        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    }
    let cubic = |x: &[f32], y: &[f32]| (dot(x, y) / 3.0 + 1.0).powi(3);
    let gaussian = |x: &[f32], y: &[f32]| {
        let cosine = dot(x, y) / (dot(x, x) * dot(y, y)).sqrt();
        ((2.0 * cosine - 2.0) / 200.0).exp()
    };
    let within = |x, kernel, equal| mean_kernel(x, x, kernel, equal);
    let expected = within(&a, cubic, false) + within(&b, cubic, false)
        - 2.0 * mean_kernel(&a, &b, cubic, true);
    is(kid(&a, &b), expected, 1e-9 * expected);
    let expected = within(&a, gaussian, true) + within(&b, gaussian, true)
        - 2.0 * mean_kernel(&a, &b, gaussian, true);
    is(cmmd(&a, &b), 1000.0 * expected, 1e-6 * expected);
}

#[test]
fn diversity_matches_scipy() {
    for (i, case) in golden()["diversity"].as_array().unwrap().iter().enumerate() {
        let rows = rows(&case["rows"]);
        let distance = pairwise_cosine_distance(&slices(&rows));
        agrees(distance, &case["pairwise_cosine_distance"], &format!("cosine {i}"));
        agrees(vendi(&slices(&rows)), &case["vendi"], &format!("Vendi {i}"));
    }
}

#[test]
fn diversity_has_its_closed_forms() {
    let cases =
        [(4, 0.5, 2.92572656), (4, 0.9, 1.41733789), (16, 0.5, 7.10352624), (16, 0.9, 1.75946337)];
    for (n, cosine, expected) in cases {
        let rows = equal_cosines(n, cosine);
        // The rows' f32 bound the digits.
        is(vendi(&slices(&rows)), expected, 1e-6);
        is(pairwise_cosine_distance(&slices(&rows)), f64::from(1.0 - cosine), 1e-6);
    }
    let axes = orthogonal(5, 0.5);
    is(vendi(&slices(&axes)), 5.0, 1e-12);
    is(pairwise_cosine_distance(&slices(&axes)), 1.0, 1e-12);
    let clusters = [&axes[..1], &axes[..1], &axes[1..2], &axes[1..2]].concat();
    is(vendi(&slices(&clusters)), 2.0, 1e-12);
    let copies = vec![gaussian(0, 1, 30).remove(0); 7];
    is(vendi(&slices(&copies)), 1.0, 1e-12);
    is(pairwise_cosine_distance(&slices(&copies)), 0.0, 1e-12);
    let opposite = [vec![2.0, 0.0], vec![-1.0, 0.0]];
    is(pairwise_cosine_distance(&slices(&opposite)), 2.0, 1e-12);
}

#[test]
fn diversity_is_a_mean_over_prompts() {
    // Prompt 7: two orthogonal pictures; 2: three alike; 9: one picture, which says nothing.
    let axes = orthogonal(2, 1.0);
    let features: Rows =
        [0, 1, 0, 0, 1, 0].iter().map(|&axis: &usize| axes[axis].clone()).collect();
    let prompts = [2, 7, 2, 7, 9, 2];
    let found = over_prompts(&features, &prompts);
    is(found.pairwise_cosine_distance, 0.5, 1e-12);
    is(found.vendi, 1.5, 1e-12);

    let none = over_prompts(&features[3..5], &[7, 9]);
    assert_eq!((none.pairwise_cosine_distance, none.vendi), (None, None));
    let mut damaged = features.clone();
    damaged[0][0] = f32::NAN;
    let none = over_prompts(&damaged, &prompts);
    assert_eq!((none.pairwise_cosine_distance, none.vendi), (None, None), "not of prompt 7 alone");
}

#[test]
fn what_does_not_exist_is_none() {
    let (none, one, two) = (Rows::new(), gaussian(0, 1, 4), gaussian(1, 2, 4));
    for few in [&none, &one] {
        for (a, b) in [(few, &two), (&two, few)] {
            assert_eq!((frechet(a, b), kid(a, b)), (None, None));
            assert_eq!(frechet_infinity(a, b, 0), None);
        }
        assert_eq!(pairwise_cosine_distance(&slices(few)), None);
        assert_eq!(vendi(&slices(few)), None);
    }
    assert_eq!((cmmd(&none, &two), cmmd(&two, &none)), (None, None));
    assert!(cmmd(&one, &two).is_some());
    assert_eq!(frechet_infinity(&two, &two, 0), None, "two pictures are one size");
    assert!(frechet_infinity(&gaussian(2, 3, 4), &two, 0).is_some());
    assert_eq!(frechet_infinity(&gaussian(2, 3, 4), &one, 0), None);
    assert_eq!((interval(&[], 0), standard_error(&[]), standard_error(&[1.0])), (None, None, None));
    assert_eq!(PixelStatistics::of(&[]), None);
    assert_eq!(PixelStatistics::of(&[image::RgbImage::new(0, 3)]), None);
    assert_eq!(PixelStatistics::of(&[image::RgbImage::new(70_000, 1)]), None, "no JPEG is so wide");
}

#[test]
fn numbers_that_are_not_finite_and_rows_that_differ_give_none() {
    let good = gaussian(0, 20, 4);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut spoiled = good.clone();
        spoiled[7][2] = bad;
        for (a, b) in [(&spoiled, &good), (&good, &spoiled), (&spoiled, &spoiled)] {
            assert_eq!((frechet(a, b), frechet_infinity(a, b, 0)), (None, None), "{bad}");
            assert_eq!((kid(a, b), cmmd(a, b)), (None, None), "{bad}");
        }
        assert_eq!(pairwise_cosine_distance(&slices(&spoiled)), None);
        assert_eq!(vendi(&slices(&spoiled)), None);
        assert_eq!(interval(&[0.0, f64::from(bad)], 0), None);
        assert_eq!(standard_error(&[0.0, f64::from(bad)]), None);
    }
    let narrow = gaussian(1, 20, 3);
    let mixed = [&good[..], &narrow[..]].concat();
    let empty = vec![Vec::new(); 20];
    for odd in [&narrow, &mixed, &empty] {
        assert_eq!((frechet(&good, odd), frechet_infinity(&good, odd, 0)), (None, None));
        assert_eq!((kid(&good, odd), cmmd(&good, odd)), (None, None));
    }
    assert_eq!((frechet(&empty, &empty), kid(&empty, &empty)), (None, None));
    let zero = [vec![0.0; 4], good[0].clone()];
    assert_eq!((cmmd(&zero, &good), vendi(&slices(&zero))), (None, None), "zero has no direction");
    assert_eq!(pairwise_cosine_distance(&slices(&zero)), None);
    assert_eq!(vendi(&slices(&mixed)), None);
    let huge = vec![vec![f32::MAX, 0.0], vec![-f32::MAX, 1.0], vec![0.0, f32::MIN_POSITIVE]];
    assert!(frechet(&huge, &huge).unwrap().is_finite() && kid(&huge, &huge).unwrap().is_finite());
    assert!(cmmd(&huge, &huge).unwrap().is_finite() && vendi(&slices(&huge)).unwrap().is_finite());
}

#[test]
fn a_vision_transformers_features_take_seconds() {
    let (a, b) = (gaussian(0, 300, 768), gaussian(1, 300, 768));
    let start = Instant::now();
    let whole = frechet(&a, &b).unwrap();
    let extrapolated = frechet_infinity(&a, &b, 0).unwrap();
    assert!(whole > 0.0 && extrapolated.is_finite() && kid(&a, &b).unwrap().abs() < 0.01);
    assert!(cmmd(&a, &b).unwrap() < whole);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

fn picture(width: usize, height: usize, rgb: Vec<u8>) -> image::RgbImage {
    image::RgbImage::from_raw(width as u32, height as u32, rgb).unwrap()
}

/// A picture of noise, of a draw that the number names.
fn noisy(number: u32) -> image::RgbImage {
    let values = noise(5, Stream::StepNoise, number, 1, 3 * 24 * 16);
    picture(24, 16, values.iter().map(|v| (128.0 + 60.0 * v).clamp(0.0, 255.0) as u8).collect())
}

fn statistics(images: &[image::RgbImage]) -> PixelStatistics {
    PixelStatistics::of(images).unwrap()
}

#[test]
fn pixel_statistics_match_numpy() {
    let golden = &golden()["pixels"];
    let side = |value: &Value| value.as_u64().unwrap() as usize;
    let read = |p: &Value| {
        let rgb = serde_json::from_value(p["rgb"].clone()).unwrap();
        picture(side(&p["width"]), side(&p["height"]), rgb)
    };
    let found =
        statistics(&golden["pictures"].as_array().unwrap().iter().map(read).collect::<Vec<_>>());
    agrees(Some(found.pvs), &golden["pvs"], "PVS");
    agrees(Some(found.saturated), &golden["saturated"], "saturated");
    agrees(Some(found.saturation), &golden["saturation"], "saturation");
    agrees(Some(found.laplacian_variance), &golden["laplacian_variance"], "Laplacian");
}

#[test]
fn pixel_statistics_of_special_sets() {
    for number in 0..5 {
        for copies in [1, 3, 7] {
            assert_eq!(statistics(&vec![noisy(number); copies]).pvs, 0.0);
        }
    }
    assert!(statistics(&[noisy(0), noisy(1)]).pvs > 0.0);

    let red = statistics(&[picture(5, 4, [255, 0, 0].repeat(20))]);
    assert_eq!((red.saturated, red.saturation, red.laplacian_variance), (1.0, 1.0, 0.0));
    let flat = statistics(&[picture(5, 4, vec![77; 60])]);
    assert_eq!((flat.saturated, flat.saturation, flat.laplacian_variance), (0.0, 0.0, 0.0));
    // One inner pixel has no variance; two have that of +-4 x 255 once and 255 once.
    let mut dot = vec![0; 3 * 12];
    dot[15..18].fill(255);
    let dot = statistics(&[picture(4, 3, dot)]);
    let expected = (5.0 * 255.0 / 2.0f64).powi(2);
    assert!((dot.laplacian_variance / expected - 1.0).abs() < 1e-12);

    let noise = statistics(&[noisy(0)]);
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95);
    encoder.encode_image(&noisy(0)).unwrap();
    assert_eq!(noise.jpeg_kb, bytes.len() as f64 / 1000.0);
    let both = statistics(&[noisy(0), picture(5, 4, vec![77; 60])]);
    assert!((both.jpeg_kb - (noise.jpeg_kb + flat.jpeg_kb) / 2.0).abs() < 1e-12);
    let text = serde_json::to_string(&both).unwrap();
    assert_eq!(serde_json::from_str::<PixelStatistics>(&text).unwrap(), both);
}

#[test]
fn intervals_cover_what_normal_theory_says() {
    let values: Vec<f64> = gaussian(3, 1, 200)[0].iter().map(|&v| f64::from(v) + 2.0).collect();
    let error = standard_error(&values).unwrap();
    let found = interval(&values, 9).unwrap();
    let bounds = found.bounds.unwrap();
    assert!((found.mean - values.iter().sum::<f64>() / 200.0).abs() < 1e-12);
    for (bound, expected) in [(bounds.low, -1.96), (bounds.high, 1.96)] {
        let found = (bound - found.mean) / error;
        assert!((found - expected).abs() < 0.15, "{found}, not {expected}");
    }
    assert_eq!(interval(&values, 9), Some(found));
    assert_ne!(interval(&values, 10), Some(found));

    let one = interval(&[0.25], 9).unwrap();
    assert_eq!((one.mean, one.bounds), (0.25, None), "one prompt says nothing of others");
    // Both, the one or the other twice: the tails of a quarter each hold the bounds.
    let two = interval(&[1.0, 3.0], 9).unwrap();
    assert_eq!((two.mean, two.bounds.map(|b| (b.low, b.high))), (2.0, Some((1.0, 3.0))));
}
