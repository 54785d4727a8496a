//! The built-in rewards on pictures whose scores are known.

use image::{Rgb, RgbImage};
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::reward::{self, Prompt, RemoteOptions, RewardContext};

use crate::support::cpu;

fn scores(spec: &str, images: &[RgbImage]) -> Vec<f64> {
    let (compute, remote) = (cpu(), RemoteOptions::default());
    let context = RewardContext { compute, storage: Storage::F32, remote };
    let prompt = Prompt::plain("a");
    reward::open(spec, &context).unwrap().score(images, &vec![&prompt; images.len()]).unwrap()
}

fn flat(rgb: [u8; 3]) -> RgbImage {
    RgbImage::from_pixel(16, 16, Rgb(rgb))
}

/// Busy and without symmetry.
fn busy() -> RgbImage {
    RgbImage::from_fn(16, 16, |x, y| {
        Rgb([(x * 97 + y * 31) as u8, (x * y * 53) as u8, (x * 13) as u8])
    })
}

#[test]
fn jpeg_size_is_in_kilobytes_and_the_signs_are_opposite() {
    let images = [flat([10, 20, 30]), busy()];
    let large = scores("jpeg-incompressibility", &images);
    let small = scores("jpeg-compressibility", &images);
    assert!(large[0] > 0.3 && large[0] < 1.0, "a file of one colour is its headers: {large:?}");
    assert!(large[1] > large[0] && small[0] > small[1]);
    assert_eq!(large, small.iter().map(|v| -v).collect::<Vec<_>>());
    let mut file = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, 95);
    images[1].write_with_encoder(encoder).unwrap();
    assert_eq!(large[1], file.len() as f64 / 1000.0);
}

#[test]
fn color_is_the_mean_distance_in_rgb_over_the_largest() {
    let images = [flat([0, 0, 255]), flat([255, 255, 0]), flat([0, 0, 0])];
    let blue = scores("color:blue", &images);
    assert!(blue[0] == 0.0 && (blue[1] + 1.0).abs() < 1e-12, "{blue:?}");
    assert!((blue[2] + 1.0 / 3f64.sqrt()).abs() < 1e-12, "one channel of three: {blue:?}");
    let mut half = flat([0, 0, 255]);
    (0..16).for_each(|y| (0..8).for_each(|x| half.put_pixel(x, y, Rgb([255, 255, 0]))));
    assert!((scores("color:blue", &[half])[0] + 0.5).abs() < 1e-12);
}

#[test]
fn symmetry_is_the_mean_difference_to_the_mirror_image() {
    let mirrored =
        RgbImage::from_fn(17, 5, |x, _| Rgb([(x as i32 - 8).unsigned_abs() as u8 * 10; 3]));
    let halves = RgbImage::from_fn(16, 4, |x, _| Rgb([if x < 8 { 0 } else { 255 }; 3]));
    let found = scores("symmetry", &[mirrored, halves, busy()]);
    assert_eq!(found[..2], [0.0, -1.0]);
    assert!(found[2] < -0.05 && found[2] > -1.0, "{found:?}");
}
