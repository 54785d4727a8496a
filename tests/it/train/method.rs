//! What the presets, samplers and other settings do to a run.

use std::path::Path;

use pcpo_wgpu::io::tensors::HostTensor;
use pcpo_wgpu::io::weights::Weights;

use super::{SMALL, of, run};
use crate::command_line::program;
use crate::support::{error_of, for_every_line};

#[test]
fn every_preset_and_variant_trains_and_leaves_a_whole_folder() {
    let variants: [&[&str]; 6] = [
        &["--preset", "ddpo", "--updates-per-epoch", "1"],
        &["--preset", "grpo", "--train-window", "true", "--noise-only-trained", "true"],
        &["--preset", "pcpo", "--kl-beta", "0.02", "--inner-epochs", "2"],
        &["--objective", "log-ratio", "--guidance-gradient", "conditional"],
        &["--guidance-scale", "1", "--initial-noise", "shared", "--advantage", "global"],
        &["--storage", "f16", "--target-modules", "to_q,ff.net.2", "--alpha", "16"],
    ];
    for variant in variants {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let args = [&["--device", "cpu", "--epochs", "1"], &SMALL[..], variant].concat();
        let lines = run(&out, &args);
        let epoch = of(&lines, "epoch").next().unwrap();
        for field in [
            "epoch",
            "reward_mean",
            "reward_std",
            "clip_frac",
            "approx_kl",
            "images_per_second",
            "seconds",
        ] {
            assert!(epoch[field].is_number(), "{variant:?}: {field}");
        }
        for update in of(&lines, "update") {
            for field in
                ["loss", "clip_frac", "approx_kl", "log_rho_mean", "log_rho_std", "grad_norm"]
            {
                assert!(update[field].is_number(), "{variant:?}: {field}");
            }
            assert!(update["grad_norm"].as_f64().unwrap() > 0.0, "{variant:?}: a gradient arrives");
            let steps = update["steps"].as_array().unwrap();
            assert_eq!(steps.len(), 3);
            for step in steps {
                let number = |field: &str| step[field].as_f64().unwrap();
                // 1/2 of the mean square: of the mean and of the spread around it.
                let half = 0.5 * (number("log_rho_mean").powi(2) + number("log_rho_std").powi(2));
                let off = (number("approx_kl") - half).abs();
                assert!(off <= 1e-3 * half, "{variant:?}: approx_kl of {step}, not {half}");
            }
        }
        for file in [
            "settings.toml",
            "adapter.safetensors",
            "before_after.png",
            "grids/epoch-00001.png",
            "checkpoints/epoch-00001/state.json",
        ] {
            assert!(out.join(file).is_file(), "{variant:?}: {file}");
        }
    }
}

#[test]
fn the_step_credit_and_noise_settings_reach_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let steps = |name: &str, args: &[&str]| {
        let out = dir.path().join(name);
        let lines = run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..], args].concat());
        let update = of(&lines, "update").next().unwrap().clone();
        let trained = update["steps"].as_array().unwrap().clone();
        trained
            .iter()
            .map(|s| (s["t"].as_u64().unwrap(), s["contribution"].as_f64().unwrap()))
            .collect::<Vec<_>>()
    };
    let spread = |s: &[(u64, f64)]| {
        let (lo, hi) = s.iter().fold((f64::MAX, 0f64), |(lo, hi), (_, c)| (lo.min(*c), hi.max(*c)));
        hi / lo
    };
    // Five trainable steps of six: the last (t = 1) only with --train-last-step.
    let native = steps("native", &["--credit", "native", "--train-steps", "5"]);
    let even = steps("even", &["--credit", "proportionate", "--train-steps", "5"]);
    assert_eq!(native.len(), 5);
    assert!(native.iter().all(|(t, _)| *t > 1));
    assert!(spread(&native) > 1.2 && spread(&even) < 1.0001, "{native:?} {even:?}");
    let all = steps("all", &["--train-last-step", "true", "--train-steps", "6"]);
    assert_eq!(all.last().unwrap().0, 1);
    let window = steps("window", &["--train-window", "true", "--train-steps", "2"]);
    assert_eq!(window[0].0 - window[1].0, 1000 / 6);
}

#[test]
fn the_embedded_jobs_raise_their_reward() {
    let dir = tempfile::tempdir().unwrap();
    for (model, job) in [("emoji", "emoji/blue"), ("emoji-flow", "emoji-flow/train")] {
        let config = format!("models/{job}.toml");
        let args = ["--device", "cpu", "--epochs", "2", "--model", model, "--config", &config];
        let seldom = ["--eval-every", "2", "--sample-every", "2", "--eval-images", "1"];
        let lines = run(&dir.path().join(model), &[&args[..], &seldom].concat());
        let rewards: Vec<f64> =
            of(&lines, "evaluation").map(|l| l["reward_mean"].as_f64().unwrap()).collect();
        assert!(rewards[1] > rewards[0] + 2e-3, "{model}: {rewards:?}");
    }
}

/// Without arguments the fit of picture and prompt is trained, with the colour watched.
#[test]
fn the_default_job_is_scored_by_the_emoji_clip() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["--images-per-epoch", "16", "--group-size", "8", "--batch", "8", "--epochs", "1"];
    let args = [&["--device", "cpu", "--model", "emoji"][..], &small].concat();
    let lines = run(&dir.path().join("run"), &args);
    let epoch = of(&lines, "epoch").next().unwrap();
    let mean = |spec: &str| epoch["rewards"][spec]["mean"].as_f64().unwrap();
    assert!((0.5..0.95).contains(&mean("clip-score:models/emoji-clip")), "{epoch}");
    assert!(mean("color:blue") < 0.0, "{epoch}");
}

#[test]
fn every_sampler_and_credit_of_a_flow_trains() {
    let dir = tempfile::tempdir().unwrap();
    let variants: [&[&str]; 6] = [
        &["--preset", "grpo"],
        &["--sampler", "dance", "--zeta", "13.343", "--grid", "diffusers", "--shift", "3"],
        &["--sampler", "cps", "--credit-total", "trained", "--activation-checkpointing", "true"],
        &["--credit", "guard", "--objective", "ppo-clip", "--kl-beta", "0.02"],
        &["--credit", "noise", "--guidance-gradient", "conditional"],
        &["--noise-only-trained", "true", "--train-window", "true", "--storage", "q8"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let out = dir.path().join(format!("run{i}"));
        let fixed = ["--device", "cpu", "--epochs", "1", "--model", "emoji-flow"];
        let lines = run(&out, &[&fixed, &SMALL[..], variant].concat());
        for update in of(&lines, "update") {
            assert!(update["grad_norm"].as_f64().unwrap() > 0.0, "{variant:?}: a gradient arrives");
            assert!(update["log_rho_std"].is_number(), "{variant:?}");
            let of_steps = update["steps"].as_array().unwrap().iter();
            let of_steps: f64 = of_steps.map(|s| s["grad_norm"].as_f64().unwrap()).sum();
            let whole = update["grad_norm"].as_f64().unwrap();
            assert!(of_steps >= 0.9999 * whole, "{variant:?}: {of_steps} and {whole}");
        }
        let adapter = Weights::open_file(&out.join("adapter.safetensors")).unwrap();
        assert!(
            adapter.names().all(|n| n.starts_with("transformer.transformer_blocks.")),
            "{variant:?}"
        );
    }
}

/// The same update, whatever holds the activations.
#[test]
fn activation_checkpointing_changes_nothing_but_memory() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["emoji", "emoji-flow"] {
        let norms = ["true", "false"].map(|checkpointing| {
            let out = dir.path().join(format!("{model}-{checkpointing}"));
            let fixed = ["--device", "cpu", "--epochs", "1", "--model", model];
            let lines = run(
                &out,
                &[&fixed, &SMALL[..], &["--activation-checkpointing", checkpointing]].concat(),
            );
            of(&lines, "update").map(|u| u["grad_norm"].as_f64().unwrap()).collect::<Vec<f64>>()
        });
        for (by_block, whole) in norms[0].iter().zip(&norms[1]) {
            assert!((by_block - whole).abs() < 1e-4 * whole, "{model}: {norms:?}");
        }
    }
}

/// Embeddings from a file are those of the encoders: the run is the same to the bit.
#[test]
fn embeddings_from_a_file_train_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let prompts = ["red apple on a white background", "cat face on a white background"];
    std::fs::write(path("prompts.txt"), prompts.join("\n")).unwrap();
    for model in ["emoji", "emoji-flow"] {
        let file = path(&format!("{model}.safetensors"));
        let list = path("prompts.txt");
        let embed =
            ["embed", "--device", "cpu", "--model", model, "--prompts", &list, "--out", &file];
        let length = ["--max-sequence-length", "16"];
        let output = program(&[&embed[..], &length].concat());
        assert!(output.status.success(), "{output:?}");
        let adapters = [vec![], vec!["--embeddings", &file]].map(|extra| {
            let out = dir.path().join(format!("{model}-{}", extra.len()));
            let fixed = ["--device", "cpu", "--epochs", "1", "--model", model, "--prompts", &list];
            run(&out, &[&fixed, &SMALL[..], &length, &extra[..]].concat());
            std::fs::read(out.join("adapter.safetensors")).unwrap()
        });
        assert!(adapters[0] == adapters[1], "{model}: the adapters differ");
    }
    let file = path("emoji.safetensors");
    let unknown =
        ["--device", "cpu", "--prompt", "a whale", "--group-size", "4", "--images-per-epoch", "4"];
    let out = path("unknown");
    let output =
        program(&[&["train", "--out", &out, "--embeddings", &file][..], &unknown].concat());
    assert_eq!(output.status.code(), Some(2));
    let error = error_of(&output);
    assert!(error.contains("a whale") && error.contains("pcpo-wgpu embed"), "{error}");
}

/// What the first update of a job was made of: latents of each trained step and image.
fn dumped(args: &[&str]) -> HostTensor {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("update.safetensors");
    let dump = ["--device", "cpu", "--epochs", "1", "--dump-update", file.to_str().unwrap()];
    run(&dir.path().join("run"), &[&dump, &SMALL[..], args].concat());
    Weights::open_file(&file).unwrap().f32("latents").unwrap()
}

/// Whether the images of one prompt have one latent at the first trained step; image i has prompt
/// i mod 2.
fn one_latent_a_group(latents: &HostTensor) -> bool {
    let images = latents.shape[1];
    let size: usize = latents.shape[2..].iter().product();
    let image = |i: usize| &latents.values[i * size..(i + 1) * size];
    assert_ne!(image(0), image(1), "prompts do not share a latent");
    (2..images).all(|i| image(i) == image(i - 2))
}

#[test]
fn shared_initial_noise_is_one_latent_a_group() {
    let all = ["--train-steps", "5"];
    let shared = dumped(&[&all[..], &["--initial-noise", "shared"]].concat());
    let own = dumped(&[&all[..], &["--initial-noise", "own"]].concat());
    assert!(one_latent_a_group(&shared) && !one_latent_a_group(&own));
    // From the second step on the images have gone their own ways.
    let size = shared.values.len() / shared.shape[0];
    let second = HostTensor { values: shared.values[size..].to_vec(), ..shared };
    assert!(!one_latent_a_group(&second));
}

/// Steps that are not trained have no noise: images that begin in one latent are one until the
/// first trained step.
#[test]
fn noise_only_trained_leaves_the_other_steps_without_noise() {
    let one = ["--initial-noise", "shared", "--train-steps", "1", "--seed", "3"];
    let quiet = dumped(&[&one[..], &["--noise-only-trained"]].concat());
    let noisy = dumped(&one);
    assert!(one_latent_a_group(&quiet), "no step before the trained one has noise");
    assert!(!one_latent_a_group(&noisy), "the trained step is not the first");
    // The flag alone means true, and can be taken back.
    let taken_back = dumped(&[&one[..], &["--noise-only-trained", "false"]].concat());
    assert_eq!(taken_back, noisy);
}

#[test]
fn grids_are_drawn_every_so_many_epochs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let asked = dir.path().join("asked");
    let file = asked.display();
    let reward = for_every_line(
        &format!("echo ${{#l}}; echo >> {file}"),
        &format!("[Console]::Out.WriteLine($l.Length); Add-Content '{file}' ''"),
    );
    let job = ["--device", "cpu", "--epochs", "3", "--reward", &reward];
    let seldom = ["--sample-every", "2", "--eval-every", "3"];
    let four = ["--eval-images", "4"];
    let lines = run(&out, &[&job[..], &seldom, &SMALL, &four].concat());
    let epochs: Vec<u64> = of(&lines, "evaluation").map(|l| l["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [0, 2, 3]);
    let exists = |epoch: usize| out.join(format!("grids/epoch-{epoch:05}.png")).is_file();
    assert_eq!([0, 1, 2, 3].map(exists), [true, false, true, true]);
    // Two prompts: 8 pictures before and after, 2 between, and 8 of each rollout.
    let scored = std::fs::read_to_string(&asked).unwrap().lines().count();
    assert_eq!(scored, 8 + 2 + 8 + 3 * 8, "an epoch without a grid asks for its rollout only");
    // It changes none of the run's numbers, so that a run may go on with another.
    let whole = dir.path().join("whole");
    run(&whole, &[&job[..], &SMALL, &four].concat());
    let adapter = |out: &Path| std::fs::read(out.join("adapter.safetensors")).unwrap();
    assert!(adapter(&out) == adapter(&whole), "the adapters differ");
}
