//! The page of a run: what stands in it.

mod chromium;

use std::collections::BTreeMap;
use std::path::Path;

use image::{Rgb, RgbImage};
use pcpo_wgpu::tools::report::{REPORT, Report, RunView, body};
use serde_json::{Value, json};

/// A name that would break HTML, and that no phone has room for.
fn bad_name() -> String {
    format!("judge:<b>&\"q\" 'n' </svg><script>{}", "x".repeat(170))
}

fn evaluation(epoch: usize, reward: f64) -> Value {
    json!({
        "kind": "evaluation", "epoch": epoch, "reward_mean": reward,
        "rewards": { bad_name(): reward * 40.0, "aesthetic": 5.1 - reward }, "pictures": 8,
        "reward_by_prompt": [reward], "rewards_by_prompt": {}, "pvs": 0.2 - reward / 10.0,
        "saturated": 0.02, "saturation": null, "laplacian_variance": 812.5, "jpeg_kb": 3.0,
        "pairwise_cosine_distance": 0.4 - reward / 5.0, "vendi": 3.1, "kid": null, "cmmd": 0.1,
        "kl": 0.001 * epoch as f64,
        "collapse": [{ "signal": "vendi", "level": "warn", "text": "vendi fell <to> 0.59" }],
    })
}

fn update(number: usize, flow: bool) -> Value {
    let step = |i: usize| {
        let contribution = (number != 2).then_some(0.5);
        let t = if flow { 1000.0 / (i as f64 + 1.1) } else { 951.0 - 150.0 * i as f64 };
        json!({
            "t": t, "weight": 1.0, "w_native": 0.3 + i as f64, "log_rho_mean": 0.0,
            "log_rho_std": 1e-5 * (i + number) as f64, "loss": 0.1, "clip_frac": 0.1 * i as f64,
            "approx_kl": 1e-8, "kl": 0.0, "contribution": contribution,
        })
    };
    json!({
        "kind": "update", "epoch": number.div_ceil(2), "update": number,
        "loss": if number == 3 { None } else { Some(0.01) }, "clip_frac": 0.07, "approx_kl": 2e-6,
        "kl": 0.0, "log_rho_mean": 0.0, "log_rho_std": 1e-4, "grad_norm": 0.005,
        "skipped": number == 3, "steps": (0..6).map(step).collect::<Vec<_>>(),
    })
}

/// An epoch as the first version wrote it.
fn old_epoch(epoch: usize, reward: f64) -> Value {
    json!({
        "kind": "epoch", "epoch": epoch, "reward_mean": reward, "reward_std": 0.05,
        "clip_frac": 0.1, "approx_kl": null, "images_per_second": 2.3, "seconds": 13.25,
        "rollout_seconds": 6.0, "decode_seconds": 0.25, "reward_seconds": 1.0,
        "update_seconds": 6.0, "rollout_peak_mib": null, "decode_peak_mib": null,
        "update_peak_mib": null, "skipped_updates": 0,
    })
}

fn epoch(epoch: usize, reward: f64) -> Value {
    let score = |mean: f64| json!({ "mean": mean, "group_std": 0.4, "flat_groups": 0.0 });
    let mut record = old_epoch(epoch, reward);
    record["rewards"] =
        json!({ bad_name(): score(reward * 40.0), "aesthetic": score(5.1 - reward) });
    record["rollout_calls"] = json!(1280);
    record["update_calls"] = json!(2048);
    record["warnings"] = json!([format!("flat: {}", bad_name())]);
    record
}

fn write_run(dir: &Path, records: &[Value]) {
    let lines: String = records.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(dir.join("metrics.jsonl"), lines).unwrap();
}

/// A run that has all that a page can show.
fn whole_run(dir: &Path, flow: bool) -> Vec<Value> {
    let mut records = vec![evaluation(0, -0.7619173440843823)];
    for number in 1..=6 {
        let reward = -0.75 + 0.1 / 3.0 * number as f64;
        records.extend([update(2 * number - 1, flow), update(2 * number, flow)]);
        records.extend([epoch(number, reward), evaluation(number, reward + 0.01)]);
    }
    write_run(dir, &records);
    let settings = toml::toml! {
        model = "models/emoji"
        reward = "http://me:secret@host/"
        watch = ["aesthetic"]
        epochs = 6
        prompt = ["a </pre><script>alert(1)</script>"]
    };
    std::fs::write(dir.join("settings.toml"), settings.to_string()).unwrap();
    let about = json!({ "program": "pcpo-wgpu 0.1.0", "device": "a <device>" });
    std::fs::write(dir.join("about.json"), about.to_string()).unwrap();
    for (folder, name) in [("grids", "epoch-0000"), ("samples", "update-00000")] {
        std::fs::create_dir_all(dir.join(folder)).unwrap();
        for number in 0..=6u32 {
            let color = |x: u32, y: u32| Rgb([(x * 2) as u8, (y * 3) as u8, (number * 40) as u8]);
            let picture = RgbImage::from_fn(if number == 3 { 900 } else { 134 }, 66, color);
            picture.save(dir.join(folder).join(format!("{name}{number}.png"))).unwrap();
        }
    }
    records
}

fn written(dir: &Path) -> String {
    Report::new().write(dir).unwrap();
    std::fs::read_to_string(dir.join(REPORT)).unwrap()
}

/// What is between each pair of marks.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> Vec<&'a str> {
    text.split(begin).skip(1).map(|rest| rest.split(end).next().unwrap()).collect()
}

/// The numbers that carry a field's name, by their epochs.
fn values(html: &str, name: &str) -> BTreeMap<usize, Vec<f64>> {
    let mut found: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for tag in between(html, &format!("data-name=\"{name}\" data-epoch=\""), ">") {
        let epoch = tag.split('"').next().unwrap().parse().unwrap();
        let number = between(tag, "data-value=\"", "\"")[0].parse().unwrap();
        found.entry(epoch).or_default().push(number);
    }
    found
}

/// That a page needs nothing from elsewhere, and that each plot is XML of which nothing is missing.
fn check_page(html: &str) {
    for attribute in ["src=\"", "href=\"", "src='", "href='"] {
        let found = between(html, attribute, "\"");
        let inside = |a: &&str| a.starts_with("data:") || a.starts_with('#');
        assert!(found.iter().all(inside), "{attribute}: {found:?}");
    }
    assert!(!html.contains("@import") && !html.contains("url("));
    for svg in between(html, "<svg", "</svg>") {
        check_xml(&format!("<svg{svg}</svg>"));
        assert!(svg.contains("viewBox=") && svg.contains("role=\"img\" aria-label=\""));
        assert!(svg.contains("<title>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}

/// That tags are closed in order, attributes are quoted and every `&` begins a known entity.
fn check_xml(text: &str) {
    for rest in text.split('&').skip(1) {
        let entity = &rest[..rest.find(';').expect("an entity ends")];
        let known = matches!(entity, "lt" | "gt" | "amp" | "quot" | "#x27");
        assert!(known, "&{entity};");
    }
    let mut open = Vec::new();
    for tag in between(text, "<", ">") {
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "<{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert!(open.is_empty(), "{open:?} stay open");
}

#[test]
fn a_page_shows_the_numbers_of_metrics_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let records = whole_run(dir.path(), false);
    let html = written(dir.path());
    check_page(&html);
    check_numbers(&html, &records);
    assert!(between(&html, "<svg", "</svg>").len() >= 20);
    assert!(html.contains("a &lt;device&gt;") && html.contains("vendi fell &lt;to&gt; 0.59"));
    assert!(!html.contains("secret"), "a password is in the page");
    assert!(!html.contains("<b>&\"q\""), "a name is not escaped");
    assert_eq!(html.matches("<script>").count(), 1, "a text of the run became a script");
    let shown = |id: &str| html.contains(&format!("<section id=\"{id}\">"));
    for id in ["pictures", "reward", "rewards", "measures", "price", "timesteps", "credit"] {
        assert!(shown(id), "{id}");
    }
    assert!(shown("updates") && shown("time") && shown("epochs") && shown("settings"));
}

/// Rewards, calls and seconds of a page, against the records.
fn check_numbers(html: &str, records: &[Value]) {
    let fields = ["reward_mean", "clip_frac", "rollout_calls", "update_calls", "seconds"];
    let mut checked = 0;
    for (kind, prefix, fields) in [
        ("epoch", "", &fields[..]),
        ("evaluation", "evaluation_", &["reward_mean"][..]),
        ("evaluation", "", &["vendi", "pairwise_cosine_distance", "kl"][..]),
    ] {
        for field in fields {
            for (epoch, found) in values(html, &format!("{prefix}{field}")) {
                let of = |r: &&Value| r["kind"] == kind && r["epoch"] == epoch;
                let record = records.iter().find(of).unwrap();
                let right = record[*field].as_f64().unwrap();
                assert!(found.iter().all(|v| *v == right), "{field} of {epoch}: {found:?}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 40, "{checked}");
}

#[test]
fn a_page_copes_with_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    check_page(&written(dir.path()));
    let rows = |html: &str| html.matches("<tr>").count().saturating_sub(1);
    let cases = [
        vec![evaluation(0, -0.76)],
        vec![json!({ "kind": "evaluation", "epoch": 0, "reward_mean": -0.76 })],
        vec![old_epoch(1, 0.0)],
        vec![
            update(1, true),
            json!({
                "kind": "suspended", "epoch": 1, "rollout": 1.0, "decode": 0.0, "reward": 0.0,
                "update": 1.0,
            }),
        ],
        vec![update(3, false), old_epoch(1, 1e300), old_epoch(2, -1e300)],
        vec![epoch(1, 0.5), evaluation(1, 0.5), evaluation(2, 1e-300)],
    ];
    for records in cases {
        write_run(dir.path(), &records);
        let html = written(dir.path());
        check_page(&html);
        assert_eq!(rows(&html), records.iter().filter(|r| r["kind"] == "epoch").count());
    }
    let long: Vec<Value> = (1..=5000).map(|e| old_epoch(e, (e as f64).sin())).collect();
    write_run(dir.path(), &long);
    let html = written(dir.path());
    check_page(&html);
    assert_eq!(rows(&html), 200);
    let ends = values(&html, "reward_mean");
    assert!(ends.contains_key(&1) && ends.contains_key(&5000));
    assert!(html.len() < 300_000, "{} bytes", html.len());
}

#[test]
fn a_page_of_a_flow_names_its_timesteps() {
    let dir = tempfile::tempdir().unwrap();
    whole_run(dir.path(), true);
    let html = written(dir.path());
    check_page(&html);
    assert!(html.contains("909.1"), "1000 / 1.1");
}

#[test]
fn a_line_that_is_being_written_is_left_out_and_a_wrong_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let line = old_epoch(1, 0.5).to_string();
    std::fs::write(&path, format!("{line}\n{}", &line[..40])).unwrap();
    assert_eq!(RunView::read(dir.path()).unwrap().records.len(), 1);
    std::fs::write(&path, format!("{}\n{line}\n", &line[..40])).unwrap();
    let error = format!("{:#}", RunView::read(dir.path()).unwrap_err());
    assert!(error.contains("metrics.jsonl: line 1 "), "{error}");
    let gone = dir.path().join("gone");
    assert!(RunView::read(&gone).unwrap_err().to_string().contains("gone"));
}

#[test]
fn pictures_are_small_in_order_and_never_more_than_forty() {
    let dir = tempfile::tempdir().unwrap();
    whole_run(dir.path(), false);
    let mut view = RunView::read(dir.path()).unwrap();
    let epochs: Vec<usize> = view.pictures.iter().filter_map(|p| p.epoch).collect();
    assert_eq!((epochs, view.pictures.len()), ((0..=6).collect(), 14));
    let sizes: Vec<(u32, u32)> = view.pictures.iter().map(|p| (p.width, p.height)).collect();
    assert_eq!((sizes[0], sizes[3]), ((134, 66), (640, 46)));
    // Without scripts, the first and the last grid are seen.
    let html = body(&view);
    assert_eq!(html.matches("<figure hidden>").count(), 5);
    view.pictures.truncate(1);
    assert!(!body(&view).contains("grid-slider"));
    for number in 7..120 {
        let picture = RgbImage::from_pixel(8, 8, Rgb([number as u8; 3]));
        picture.save(dir.path().join(format!("grids/epoch-{number:05}.png"))).unwrap();
    }
    let view = RunView::read(dir.path()).unwrap();
    let epochs: Vec<usize> = view.pictures.iter().filter_map(|p| p.epoch).collect();
    assert!(epochs.len() <= 40 && epochs[0] == 0 && epochs[epochs.len() - 1] == 119, "{epochs:?}");
}
