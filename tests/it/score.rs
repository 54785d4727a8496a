//! `pcpo-wgpu score`: what it prints, and what it refuses.

use serde_json::Value;

use crate::command_line::program;
use crate::support::{error_of, for_every_line, golden};

const EMOJI_CLIP: &str = "clip-score:models/emoji-clip";

fn score(args: &[&str]) -> Value {
    let output = program(&[&["score", "--device", "cpu", "--json"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", error_of(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(args: &[&str], words: &[&str]) {
    let output = program(&[&["score", "--device", "cpu"], args].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    words.iter().for_each(|w| assert!(error.contains(w), "{args:?}: {w:?} is not in {error}"));
    assert!(!error.contains("panicked"), "{error}");
}

/// Pictures in two colours.
fn pictures(dir: &std::path::Path) -> [String; 2] {
    ["blue", "yellow"].map(|name| {
        let rgb = if name == "blue" { [0, 0, 255] } else { [255, 255, 0] };
        let file = dir.join(format!("{name}.png"));
        image::RgbImage::from_pixel(64, 64, image::Rgb(rgb)).save(&file).unwrap();
        file.to_str().unwrap().to_string()
    })
}

#[test]
fn rows_have_a_picture_a_prompt_and_scores_by_the_name_that_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let [blue, yellow] = pictures(dir.path());
    let args = ["--reward", "color:blue", "--reward", "0.5*color:blue", "--reward", EMOJI_CLIP];
    let json = score(
        &[&args[..], &["--prompt", "cat face on a blue background", &blue, &yellow]].concat(),
    );
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["image"], yellow.as_str());
    assert_eq!(rows[0]["prompt"], "cat face on a blue background");
    let of = |row: usize, spec: &str| rows[row]["scores"][spec].as_f64().unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    near(of(0, "color:blue"), 0.0);
    near(of(1, "color:blue"), -1.0);
    near(of(1, "0.5*color:blue"), -0.5);
    assert_eq!(rows[0]["scores"].as_object().unwrap().len(), 3);
    assert!(of(0, EMOJI_CLIP) > of(1, EMOJI_CLIP) + 0.1, "the background is known");
}

/// The generated pictures of the README's grid know their captions.
#[test]
fn one_line_a_picture_and_metadata_reach_the_reward() {
    let dir = tempfile::tempdir().unwrap();
    let [blue, yellow] = pictures(dir.path());
    let prompts = dir.path().join("prompts.jsonl");
    // A mark at the beginning, and two systems' ends of lines.
    let lines = "\u{feff}plain {a|b}\r{\"prompt\": \"a sign\", \"text\": \"STOP\"}\r\n";
    std::fs::write(&prompts, lines).unwrap();
    let seen = dir.path().join("seen");
    let reward = for_every_line(
        &format!("echo \"$l\" >> {}; echo 1", seen.display()),
        &format!("Add-Content '{}' $l; [Console]::Out.WriteLine(1)", seen.display()),
    );
    let prompts = prompts.to_str().unwrap();
    let json = score(&["--reward", &reward, "--prompts", prompts, &blue, &yellow]);
    assert_eq!(json["rows"][0]["prompt"], "plain {a|b}");
    assert_eq!(json["rows"][1]["prompt"], "a sign");
    let seen = std::fs::read_to_string(seen).unwrap();
    let items: Vec<Value> = seen.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(items[0]["metadata"], serde_json::json!({}));
    assert_eq!(
        (&items[1]["prompt"], &items[1]["metadata"]["text"]),
        (&"a sign".into(), &"STOP".into())
    );
}

/// A copy of a golden folder in which a field of a configuration has another number.
fn copy(dir: &std::path::Path, name: &str, file: &str, field: &str, number: &str) -> String {
    let to = dir.join(name);
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(golden("reward").join(name)).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    let text = std::fs::read_to_string(to.join(file)).unwrap();
    assert!(text.contains(field), "{text}");
    let (key, _) = field.split_once(':').unwrap();
    std::fs::write(to.join(file), text.replace(field, &format!("{key}: {number}"))).unwrap();
    to.to_str().unwrap().to_string()
}

#[test]
fn what_cannot_be_scored() {
    let dir = tempfile::tempdir().unwrap();
    let [blue, yellow] = pictures(dir.path());
    let color = ["--reward", "color:blue"];
    let with = |more: &[&str], words: &[&str]| refused(&[&color[..], more].concat(), words);
    with(&[&blue], &["--prompt"]);
    with(&["--prompt", "a", "no-such.png"], &["no-such.png"]);
    with(&["--prompt", "a", "README.md"], &["README.md"]);
    let photo = std::fs::read(golden("reward/pictures/g-photo-640x480.jpg")).unwrap();
    let cut = dir.path().join("cut.jpg");
    std::fs::write(&cut, &photo[..photo.len() / 2]).unwrap();
    with(&["--prompt", "a", cut.to_str().unwrap()], &["cut.jpg", "end"]);
    with(&["--prompt", "a"], &["IMAGE"]);
    with(&["--reward", "color:blue", "--prompt", "a", &blue], &["color:blue", "twice"]);
    with(&["--prompt", "{\"text\": 1}", &blue], &["prompt"]);
    with(&["--prompt", "{\"prompt\": 1}", &blue], &["not a text"]);
    with(&["--prompt", "{\"prompt\"", &blue], &["JSON"]);
    let file = dir.path().join("prompts.txt");
    std::fs::write(&file, "one\n").unwrap();
    with(&["--prompts", file.to_str().unwrap(), &blue, &yellow], &["1 prompts", "2 pictures"]);
    let of =
        |spec: &str, words: &[&str]| refused(&["--reward", spec, "--prompt", "a", &blue], words);
    of("nan*color:blue", &["nan*color:blue", "finite"]);
    of("0*color:blue", &["0*color:blue"]);
    of("beauty", &["--reward beauty", "clip-score:PATH"]);
    of("clip-score", &["clip-score:PATH"]);
    of("clip-score:", &["clip-score:PATH"]);
    of("clip-score:no/such", &["no/such"]);
    of("clip-score:models/emoji", &["models/emoji"]);
    of("aesthetic:models/emoji-clip", &["CLIP,HEAD"]);
    let head = golden("reward/heads/linear.pth");
    of(&format!("aesthetic:models/emoji-clip,{}", head.display()), &["24", "64"]);
    of("aesthetic:models/emoji-clip,no-such.pth", &["no-such.pth"]);
    let hostile = golden("reward/pickles/hostile.pt");
    of(&format!("hps-v2.1:{}", hostile.display()), &["hostile.pt", "imports", "system"]);
    let plain = golden("reward/pickles/plain.pt");
    of(&format!("clip-score:{}", plain.display()), &["plain.pt"]);
    of("image-reward:models/emoji-clip", &["models/emoji-clip"]);
    let layers = copy(dir.path(), "clip", "config.json", "\"num_hidden_layers\": 2", "1");
    of(&format!("clip-score:{layers}"), &["more layers"]);
    let patch = copy(dir.path(), "open_clip", "open_clip_config.json", "\"patch_size\": 16", "0");
    of(&format!("clip-score:{patch}"), &["open_clip_config.json", "patch_size"]);
    of("http:http://127.0.0.1:9/", &["127.0.0.1:9", "reached"]);
    of("http://127.0.0.1:9/", &["127.0.0.1:9", "reached"]);
    of("http:ftp://127.0.0.1/", &["ftp"]);
    of("judge:http://127.0.0.1:9", &["URL#MODEL"]);
}
