//! `eval`: numbers about a model's pictures, and about pictures that exist.

use std::path::Path;

use image::{Rgb, RgbImage};
use serde_json::Value;

use crate::command_line::program;
use crate::support::{error_of, golden};

const KEYS: [&str; 14] = [
    "rewards",
    "frechet",
    "frechet_infinity",
    "kid",
    "cmmd",
    "pairwise_cosine_distance",
    "vendi",
    "pvs",
    "saturated",
    "laplacian_variance",
    "kl",
    "frechet_floor",
    "kid_floor",
    "cmmd_floor",
];
const CLIP: &str = "clip:models/emoji-clip";

fn json(args: &[&str]) -> Value {
    let output = program(&[&["eval", "--json", "--device", "cpu"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", error_of(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in KEYS {
        assert!(json.get(key).is_some(), "{key} is not in {json}");
    }
    let flat = json.as_object().unwrap().iter().filter(|(key, _)| !key.starts_with("rewards"));
    for (key, value) in flat {
        assert!(value.is_number() || value.is_null(), "{key}: {value}");
    }
    json
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Pictures that differ by number and colour.
fn pictures(dir: &Path, colors: std::ops::Range<u8>) {
    std::fs::create_dir_all(dir).unwrap();
    for (i, c) in colors.enumerate() {
        let pixel = |x: u32, y: u32| Rgb([c.wrapping_mul(37), (x * 7) as u8, (y * x) as u8 ^ c]);
        RgbImage::from_fn(32, 32, pixel).save(dir.join(format!("{i:03}.png"))).unwrap();
    }
}

#[test]
fn pictures_that_exist_need_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let (own, others) = (dir.path().join("own"), dir.path().join("others"));
    pictures(&own, 0..12);
    pictures(&others, 60..84);
    let plain = json(&["--images-from", text(&own)]);
    assert_eq!((plain["pictures"].as_u64(), plain["prompts"].as_u64()), (Some(12), Some(1)));
    for known in ["pvs", "saturated", "laplacian_variance", "jpeg_kb"] {
        assert!(plain[known].is_f64(), "{known}");
    }
    for unknown in ["frechet", "kid", "cmmd", "vendi", "kl", "frechet_floor"] {
        assert!(plain[unknown].is_null(), "{unknown}");
    }
    let to = |reference: &Path| {
        let (own, reference) = (text(&own), text(reference));
        json(&["--images-from", own, "--features", CLIP, "--reference", reference])
    };
    let (same, other) = (to(&own), to(&others));
    for distance in ["frechet", "cmmd"] {
        assert!(same[distance].as_f64().unwrap().abs() < 1e-6, "{distance}: {}", same[distance]);
        assert!(other[distance].as_f64().unwrap() > 1e-3, "{distance}: {}", other[distance]);
    }
    assert!(other["kid"].as_f64() > same["kid"].as_f64());
    assert!(other["frechet_floor"].is_f64() && other["frechet_infinity"].is_f64());
    let vendi = other["vendi"].as_f64().unwrap();
    assert!((1.0..=12.0).contains(&vendi), "{vendi}");
    assert!(other["pairwise_cosine_distance"].as_f64().unwrap() > 0.0 && other["kl"].is_null());
}

/// Rewards are scored with the pictures' own prompts, and their interval is one over prompts.
#[test]
fn rewards_have_an_interval_over_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let (own, prompts) = (dir.path().join("own"), dir.path().join("prompts.txt"));
    pictures(&own, 0..6);
    std::fs::write(&prompts, "a cat\na dog\n{\"prompt\": \"an owl\", \"n\": 1}\n").unwrap();
    let (own, prompts) = (text(&own), text(&prompts));
    let spec = "clip-score:models/emoji-clip";
    let found = json(&[
        "--images-from",
        own,
        "--prompts",
        prompts,
        "--reward",
        spec,
        "--reward",
        "2*symmetry",
    ]);
    assert_eq!(found["prompts"], 3);
    for name in [spec, "2*symmetry"] {
        let of = |key: &str| found[key][name].as_f64().unwrap();
        let (low, mean, high) = (of("rewards_low"), of("rewards"), of("rewards_high"));
        assert!(low <= mean && mean <= high && low < high, "{name}: {low} {mean} {high}");
    }
    // The same pictures by `score`.
    let files: Vec<String> = (0..6).map(|i| format!("{own}/{i:03}.png")).collect();
    let lines = Path::new(own).join("lines.txt");
    std::fs::write(&lines, "a cat\na cat\na dog\na dog\nan owl\nan owl\n").unwrap();
    let mut args = vec!["score", "--json", "--reward", spec, "--prompts", text(&lines)];
    args.extend(files.iter().map(String::as_str));
    let scored: Value = serde_json::from_slice(&program(&args).stdout).unwrap();
    let scores = scored["rows"].as_array().unwrap().iter();
    let mean = scores.map(|row| row["scores"][spec].as_f64().unwrap()).sum::<f64>() / 6.0;
    assert!((mean - found["rewards"][spec].as_f64().unwrap()).abs() < 1e-6);
    // One prompt has no interval.
    let one = json(&["--images-from", own, "--reward", "symmetry"]);
    assert!(one["rewards"]["symmetry"].is_f64() && one["rewards_low"]["symmetry"].is_null());
}

/// Without an adapter the pictures are the base's own: their distance is the floor, their KL 0.
/// With one that does something both differ.
#[test]
fn a_model_is_compared_with_itself_without_its_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let short = ["--epochs", "1", "--steps", "4", "--train-steps", "2", "--learning-rate", "0.3"];
    let trained =
        program(&[&["train", "--device", "cpu", "--out", text(&run)], &short[..]].concat());
    assert!(trained.status.success(), "{}", error_of(&trained));
    let (lora, out) = (run.join("adapter.safetensors"), dir.path().join("pictures"));
    let drawn = [
        "--prompt",
        "cat face on a white background",
        "--prompt",
        "owl on a white background",
        "--images",
        "3",
        "--steps",
        "4",
        "--features",
        CLIP,
        "--reward",
        "color:blue",
    ];
    let base = json(&drawn);
    assert_eq!((base["kl"].as_f64(), base["pictures"].as_u64()), (Some(0.0), Some(6)));
    for distance in ["frechet", "kid", "cmmd"] {
        assert!(base[distance].is_f64());
        assert_eq!(base[distance], base[format!("{distance}_floor")], "{distance}");
    }
    let adapted = json(&[&drawn[..], &["--lora", text(&lora), "--out", text(&out)]].concat());
    assert!(adapted["kl"].as_f64().unwrap() > 0.0);
    assert_ne!(adapted["frechet"], base["frechet"]);
    for floor in ["frechet_floor", "kid_floor", "cmmd_floor"] {
        let close = (adapted[floor].as_f64().unwrap() - base[floor].as_f64().unwrap()).abs();
        assert!(close < 1e-5, "{floor}");
    }
    // The pictures that it keeps are those that it measured.
    let again = json(&["--images-from", text(&out), "--reward", "color:blue"]);
    for key in ["pvs", "saturated", "laplacian_variance", "jpeg_kb"] {
        assert_eq!(again[key], adapted[key], "{key}");
    }
    let mean = |json: &Value| json["rewards"]["color:blue"].as_f64().unwrap();
    assert!((mean(&again) - mean(&adapted)).abs() < 1e-12);
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (own, empty) = (dir.path().join("own"), dir.path().join("empty"));
    pictures(&own, 0..3);
    std::fs::create_dir(&empty).unwrap();
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("a.png"), b"no picture").unwrap();
    let missing = text(dir.path()).to_string() + "/missing";
    let folder = |path: &Path| text(path).to_string();
    let (own, empty, broken) = (folder(&own), folder(&empty), folder(&broken));
    let model = folder(&golden("simple"));
    let cases: [(&[&str], &[&str]); 13] = [
        (&[], &["--prompts FILE or --prompt TEXT"]),
        (&["--images-from", &missing], &["--images-from", "missing"]),
        (&["--images-from", &empty], &["--images-from", "holds no picture"]),
        (&["--images-from", &broken], &["a.png"]),
        (&["--images-from", &own, "--lora", "x"], &["--lora", "--images-from"]),
        (&["--images-from", &own, "--model", &model], &["--model", "--images-from"]),
        (&["--images-from", &own, "--reference", &own], &["--features"]),
        (
            &["--images-from", &own, "--features", CLIP, "--reference", &empty],
            &["--reference", "holds no picture"],
        ),
        (&["--images-from", &own, "--features", "dino:x"], &["--features dino:x", "clip:PATH"]),
        (&["--images-from", &own, "--features", "clip:"], &["--features clip:", "clip:PATH"]),
        (
            &["--images-from", &own, "--reward", "clip-score:models/emoji-clip"],
            &["--reward clip-score", "--prompts FILE"],
        ),
        (
            &["--images-from", &own, "--prompt", "a", "--prompt", "b", "--reward", "symmetry"],
            &["2 prompts for 3 pictures"],
        ),
        (&["--prompt", "a", "--guidance", "nan"], &["--guidance NaN", "finite"]),
    ];
    for (args, parts) in cases {
        let output = program(&[&["eval", "--device", "cpu"], args].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: {part} is not in {error}");
        }
    }
    for count in ["0", "1000001"] {
        let output = program(&["eval", "--prompt", "a", "--images", count]);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2));
        assert!(error.contains(&format!("--images {count}: must be at")), "{error}");
    }
}
