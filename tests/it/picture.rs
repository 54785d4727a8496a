//! Pictures for reward models, against Pillow, PyTorch and transformers. The golden numbers are
//! made by tests/golden/make_pictures.py.

use image::{ImageFormat, Rgb, RgbImage};
use pcpo_wgpu::model::config::Config;
use pcpo_wgpu::model::picture::{Fit, Preparation, open_rgb};
use pcpo_wgpu::model::resize::{resize_rgb_f32, resize_rgb8};
use serde_json::{Value, json};

use crate::support::golden;

fn read() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("pictures.json")).unwrap()).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    bytes(value).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn whole(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn picture(case: &Value) -> RgbImage {
    let (width, height) = (whole(&case["width"]) as u32, whole(&case["height"]) as u32);
    RgbImage::from_raw(width, height, bytes(&case["pixels"])).unwrap()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn resizes_as_pillow_and_torch() {
    for case in read()["resizes"].as_array().unwrap() {
        let image = picture(case);
        let from = [image.width(), image.height()].map(|side| side as usize);
        let to = [0, 1].map(|i| whole(&case["to"][i]));
        let bits = resize_rgb8(&image, to[0] as u32, to[1] as u32).unwrap();
        assert_eq!(bits.as_raw(), &bytes(&case["pillow"]), "{from:?} to {to:?}");
        if !case["torch"].is_null() {
            let values: Vec<f32> = image.as_raw().iter().map(|&v| f32::from(v) / 255.0).collect();
            let values = resize_rgb_f32(&values, from, to).unwrap();
            let off = furthest(&values, &floats(&case["torch"]));
            assert!(off < 1e-6, "{from:?} to {to:?}: {off}");
        }
    }
}

#[test]
fn prepares_as_the_references() {
    for case in read()["inputs"].as_array().unwrap() {
        let fit = match case["fit"].as_str().unwrap() {
            "transformers" => Fit::Transformers,
            "open_clip" => Fit::OpenClip,
            "stretch" => Fit::Stretch,
            "hps" => Fit::Hps,
            other => panic!("{other}"),
        };
        let (size, crop) = (whole(&case["size"]), whole(&case["crop"]));
        let preparation = Preparation { crop, ..Preparation::clip(fit, size) };
        let input = preparation.apply(&picture(case)).unwrap();
        let off = furthest(&input, &floats(&case["input"]));
        let name = format!("{fit:?} {}x{} {size} {crop}", case["width"], case["height"]);
        assert!(off < 5e-6, "{name}: {off}");
    }
}

/// Only the crop of a picture that would be 224 x 22 400 000 is computed.
#[test]
fn extreme_shapes_cost_little() {
    let color = Rgb([255, 0, 128]);
    for (width, height) in [(1, 100_000), (100_000, 1), (1, 1), (1000, 1)] {
        let image = RgbImage::from_pixel(width, height, color);
        for fit in [Fit::Transformers, Fit::OpenClip, Fit::Stretch, Fit::Hps] {
            let input = Preparation::clip(fit, 224).apply(&image).unwrap();
            assert_eq!(input.len(), 3 * 224 * 224);
            let middle =
                Preparation::clip(fit, 1).apply(&RgbImage::from_pixel(1, 1, color)).unwrap();
            // A line that is one pixel wide has 111 black pixels before it.
            let at = if fit == Fit::Hps { 111 * 225 } else { 112 * 225 };
            assert!((input[at] - middle[0]).abs() < 1e-5, "{fit:?} {width}x{height}");
        }
    }
    for fit in [Fit::Transformers, Fit::OpenClip, Fit::Stretch, Fit::Hps] {
        assert!(Preparation::clip(fit, 224).apply(&RgbImage::new(0, 5)).is_err());
    }
    assert!(resize_rgb8(&RgbImage::new(2, 2), 0, 1).is_err());
    assert!(resize_rgb8(&RgbImage::new(2, 2), 100_000, 100_000).is_err());
    assert!(resize_rgb_f32(&[0.0; 11], [2, 2], [1, 1]).is_err());
}

fn configured(json: Value) -> Result<Preparation, String> {
    Preparation::from_json(&Config { path: "preprocessor_config.json".into(), json })
        .map_err(|e| format!("{e:#}"))
}

#[test]
fn reads_preprocessor_configs() {
    let clip = Preparation::clip(Fit::Transformers, 224);
    assert_eq!(configured(json!({})).unwrap(), clip);
    let openai = json!({
        "crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    });
    assert_eq!(configured(openai).unwrap(), clip);
    let sides = json!({"size": {"shortest_edge": 30}, "crop_size": {"height": 20, "width": 20}});
    let sides = configured(sides).unwrap();
    assert_eq!((sides.fit, sides.size, sides.crop), (Fit::Transformers, 30, 20));
    let square = json!({"size": {"height": 30, "width": 30}, "do_center_crop": false});
    let square = configured(square).unwrap();
    assert_eq!((square.fit, square.size, square.crop), (Fit::Stretch, 30, 30));
    let plain = configured(json!({"do_rescale": false, "do_normalize": false})).unwrap();
    assert_eq!((plain.rescale, plain.mean, plain.std), (1.0, [0.0; 3], [1.0; 3]));
}

#[test]
fn refuses_configs_by_name() {
    let bad = [
        ("resample", json!(2)),
        ("resample", json!("bicubic")),
        ("do_resize", json!(false)),
        ("do_center_crop", json!(false)),
        ("do_center_crop", json!(1)),
        ("do_convert_rgb", json!("yes")),
        ("do_pad", json!(true)),
        ("size", json!("224")),
        ("size", json!(0)),
        ("size", json!(1e9)),
        ("size", json!({"height": 2, "width": 3})),
        ("size", json!({"height": 2})),
        ("size", json!({"longest_edge": 2})),
        ("size", json!({"longest_edge": 9, "shortest_edge": 2})),
        ("crop_size", json!([1, 1])),
        ("crop_size", json!({})),
        ("crop_size", json!(-1)),
        ("rescale_factor", json!("1/255")),
        ("image_mean", json!([0.5, 0.5])),
        ("image_mean", json!([0.5, "a", 0.5, 0.5])),
        ("image_std", json!([0.5, 0.0, 0.5])),
        ("image_processor_type", json!("ViTImageProcessor")),
    ];
    for (field, value) in bad {
        let error = configured(json!({ field: value })).unwrap_err();
        for part in ["preprocessor_config.json", field, &value.to_string()] {
            assert!(error.contains(part), "{field} {value}: {error}");
        }
    }
    assert!(configured(json!([])).unwrap_err().contains("preprocessor_config.json"));
}

#[test]
fn opens_pictures_by_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("picture.txt");
    let case = &read()["transparent"];
    std::fs::write(&path, bytes(&case["png"])).unwrap();
    let flat = open_rgb(&path).unwrap();
    for (a, b) in flat.as_raw().iter().zip(bytes(&case["pixels"])) {
        assert!(a.abs_diff(b) <= 1, "{a} {b}");
    }

    let color = RgbImage::from_pixel(9, 7, Rgb([200, 100, 50]));
    color.save_with_format(&path, ImageFormat::Png).unwrap();
    assert_eq!(open_rgb(&path).unwrap(), color);
    color.save_with_format(&path, ImageFormat::Jpeg).unwrap();
    assert!(
        open_rgb(&path)
            .unwrap()
            .as_raw()
            .iter()
            .zip(color.as_raw())
            .all(|(a, b)| a.abs_diff(*b) < 9)
    );
    image::GrayImage::from_pixel(3, 2, image::Luma([77]))
        .save_with_format(&path, ImageFormat::Png)
        .unwrap();
    assert_eq!(open_rgb(&path).unwrap(), RgbImage::from_pixel(3, 2, Rgb([77; 3])));
    let deep = image::ImageBuffer::from_pixel(3, 2, Rgb([65535u16, 0, 257 * 90]));
    deep.save_with_format(&path, ImageFormat::Png).unwrap();
    assert_eq!(open_rgb(&path).unwrap(), RgbImage::from_pixel(3, 2, Rgb([255, 0, 90])));
}

#[test]
fn names_what_is_no_picture() {
    let dir = tempfile::tempdir().unwrap();
    let (text, cut) = (dir.path().join("text.png"), dir.path().join("cut.png"));
    std::fs::write(&text, "no picture").unwrap();
    let bomb = dir.path().join("bomb.png");
    let png = bytes(&read()["transparent"]["png"]);
    std::fs::write(&cut, &png[..png.len() / 2]).unwrap();
    std::fs::write(&bomb, huge(png)).unwrap();
    for path in [&text, &cut, &bomb, &dir.path().join("missing.png"), &dir.path().to_path_buf()] {
        let error = format!("{:#}", open_rgb(path).unwrap_err());
        for part in [path.to_str().unwrap(), "PNG", "JPEG"] {
            assert!(error.contains(part), "{error}");
        }
    }
}

/// A PNG whose header says 60 000 x 60 000.
fn huge(mut png: Vec<u8>) -> Vec<u8> {
    png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    let mut crc = u32::MAX;
    for &byte in &png[12..29] {
        crc ^= u32::from(byte);
        (0..8).for_each(|_| crc = (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 });
    }
    png[29..33].copy_from_slice(&(!crc).to_be_bytes());
    png
}
