//! What the presets and the layers of settings resolve to.

use clap::{Args, ValueEnum};
use pcpo_wgpu::config::recipe::RECIPES;
use pcpo_wgpu::config::{InitialNoise, Objective, Options, Plain, Preset, Rollout, Settings};
use pcpo_wgpu::ops::advantage::Advantage;
use pcpo_wgpu::schedule::Sampler;
use pcpo_wgpu::schedule::credit::Credit;

use crate::support::{emoji, golden};

fn options() -> Options {
    Options {
        model: Some(golden("simple")),
        reward: Some(vec!["symmetry".into()]),
        prompt: Some(vec!["a".into()]),
        ..Default::default()
    }
}

fn plain(s: &Settings) -> &Plain {
    match &s.rollout {
        Rollout::Plain(plain) => plain,
        Rollout::Branching(branching) => panic!("{branching:?}"),
    }
}

#[test]
fn presets_are_those_of_the_papers() {
    let resolve = |preset| Options { preset, ..options() }.resolve().unwrap();
    let row = |s: &Settings| {
        let Plain { initial_noise, train_last_step, .. } = plain(s);
        (s.objective, s.credit, *initial_noise, s.advantage, *train_last_step)
    };
    let (ddpo, grpo, pcpo) =
        (resolve(Some(Preset::Ddpo)), resolve(Some(Preset::Grpo)), resolve(Some(Preset::Pcpo)));
    assert_eq!(
        row(&ddpo),
        (Objective::PpoClip, Credit::Native, InitialNoise::Own, Advantage::PerPrompt, true)
    );
    assert_eq!((ddpo.tracker_size, ddpo.tracker_min_count), (32, 16));
    assert_eq!(
        row(&grpo),
        (Objective::PpoClip, Credit::Native, InitialNoise::Shared, Advantage::Group, false)
    );
    assert_eq!(
        row(&pcpo),
        (Objective::LogHinge, Credit::Proportionate, InitialNoise::Shared, Advantage::Group, false)
    );
    assert!([&ddpo, &grpo, &pcpo].iter().all(|s| s.updates_per_epoch == 2 && s.kl_beta == 0.0));
    // grpo and pcpo differ in objective and credit only; pcpo is the default.
    let as_grpo = Settings {
        preset: Preset::Grpo,
        objective: Objective::PpoClip,
        credit: Credit::Native,
        ..pcpo.clone()
    };
    assert_eq!(toml::to_string(&as_grpo).unwrap(), toml::to_string(&grpo).unwrap());
    assert_eq!(toml::to_string(&resolve(None)).unwrap(), toml::to_string(&pcpo).unwrap());
}

/// docs/RESULTS.md chose: PCPO for diffusion, branching for a flow whose user has said nothing of
/// images, steps or the method.
#[test]
fn each_family_has_its_own_default() {
    let flow = Options { model: Some(golden("sd3")), ..options() };
    let preset = |o: &Options| o.resolve().unwrap().preset;
    assert_eq!(preset(&options()), Preset::Pcpo);
    assert_eq!(preset(&flow), Preset::Branch);
    let whole = flow.resolve().unwrap();
    assert_eq!(whole.images_per_epoch(), 30, "one prompt, one root");
    for named in [
        Options { group_size: Some(4), ..flow.clone() },
        Options { train_steps: Some(2), ..flow.clone() },
        Options { credit: Some(Credit::Guard), ..flow.clone() },
        Options { preset: Some(Preset::Pcpo), ..flow.clone() },
    ] {
        assert_eq!(preset(&named), Preset::Pcpo, "{named:?}");
    }
    let nft = Options { objective: Some(Objective::Nft), ..flow };
    assert_eq!(preset(&nft), Preset::Nft);
    // An embedded job's numbers of images are nobody's words.
    let embedded = Options { model: Some("emoji-flow".into()), ..Default::default() };
    assert_eq!(preset(&embedded), Preset::Branch);
    let plain = Options { preset: Some(Preset::Grpo), ..embedded };
    assert_eq!(plain.resolve().unwrap().images_per_epoch(), 32);
}

#[test]
fn flags_win_over_the_file_which_wins_over_the_preset() {
    let file = Options {
        preset: Some(Preset::Ddpo),
        train_last_step: Some(false),
        epochs: Some(7),
        ..options()
    };
    let flags = Options { epochs: Some(3), ..Default::default() };
    let s = flags.over(&file).unwrap().resolve().unwrap();
    assert_eq!((s.epochs, plain(&s).train_last_step, s.objective), (3, false, Objective::PpoClip));
    // What a run saves is a file that says the same again.
    let saved: Options = toml::from_str(&toml::to_string(&s).unwrap()).unwrap();
    assert_eq!(toml::to_string(&saved.resolve().unwrap()).unwrap(), toml::to_string(&s).unwrap());
}

#[test]
fn an_adapter_brings_its_own_rank_and_alpha() {
    let file = golden("lora/peft.safetensors");
    let own = Options { lora: Some(file), ..options() };
    let s = own.resolve().unwrap();
    assert!(s.rank > 0 && s.rank != 16 && s.target_modules.is_empty(), "rank {}", s.rank);
    let refused = |o: Options, word: &str| {
        let error = format!("{:#}", o.resolve().unwrap_err());
        assert!(error.contains(word) && error.contains("leave"), "{error}");
    };
    refused(Options { rank: Some(99), ..own.clone() }, "--rank 99");
    refused(Options { alpha: Some(0.5), ..own.clone() }, "--alpha 0.5");
    refused(Options { target_modules: Some(vec!["to_q".into()]), ..own }, "--target-modules");
}

/// Help texts name defaults, and say what a run takes.
#[test]
fn defaults_in_the_help_are_those_of_a_run() {
    let options = Options {
        model: Some(emoji()),
        reward: Some(vec!["color:blue".into()]),
        prompt: Some(vec!["cat".into()]),
        ..Default::default()
    };
    let settings = toml::Table::try_from(options.resolve().unwrap()).unwrap();
    let command = Options::augment_args(clap::Command::new("train"));
    let mut compared = 0;
    for arg in command.get_arguments() {
        let (flag, help) = (arg.get_long().unwrap(), arg.get_help().unwrap().to_string());
        let Some((_, default)) = help.split_once("[default: ") else { continue };
        let default = default.split(']').next().unwrap();
        if ["steps", "eta"].contains(&flag) {
            // `N for a, M for b and c`
            for part in default.split(", ") {
                let (value, names) = part.split_once(" for ").unwrap();
                for name in names.split(" and ") {
                    let sampler = Sampler::from_str(name, false).unwrap();
                    let own = match flag {
                        "steps" => sampler.default_steps() as f64,
                        _ => sampler.default_eta(),
                    };
                    assert_eq!(value.parse::<f64>().unwrap(), own, "--{flag}: {part}");
                }
            }
        }
        // What is a sentence is not compared, nor the default model: it is another one here.
        let named = flag != "model" && !default.contains(' ');
        let Some(own) = settings.get(flag).filter(|_| named) else { continue };
        let own = own.as_str().map_or_else(|| own.to_string(), str::to_string);
        let same = match (default.parse::<f64>(), own.parse::<f64>()) {
            (Ok(said), Ok(own)) => said == own,
            _ => default == own,
        };
        assert!(same, "--{flag}: the help says {default}, a run takes {own}");
        compared += 1;
    }
    assert!(compared >= 20, "{compared} defaults");
}

/// A recipe is a file of options that make a run of its family's model; flags win over it.
#[test]
fn recipes_are_runs_of_their_families() {
    for recipe in &RECIPES {
        let family = match recipe.name.split('-').next().unwrap() {
            "sd15" => "sd15",
            "sd35m" => "sd35m",
            "flux" => "flux-dev",
            "flux2" => "flux2-klein",
            "z" => "z-image",
            other => panic!("{other} has no model here"),
        };
        let prompts: Vec<String> = (0..8).map(|i| format!("prompt {i}")).collect();
        let own = Options {
            model: Some(golden(family)),
            reward: Some(vec!["symmetry".into()]),
            prompt: Some(prompts),
            ..Default::default()
        };
        let flags = Options { epochs: Some(3), ..own };
        let s = flags.over(&recipe.options().unwrap()).unwrap().resolve().unwrap();
        let own = s.resolution.map(|r| r.to_string());
        assert_eq!((s.epochs, own.as_deref()), (3, Some("512")), "{}", recipe.name);
        let group = s.images_per_epoch() / s.groups();
        assert!(s.learning_rate == 3e-4 && group >= 16, "{}", recipe.name);
        assert!(recipe.memory().ends_with(" GiB") && !recipe.title().contains('#'));
        let card: f64 = recipe.name.rsplit('-').next().unwrap().replace("gb", "").parse().unwrap();
        let memory: f64 = recipe.memory().trim_end_matches(" GiB").parse().unwrap();
        assert!(memory < card, "{} needs {memory}", recipe.name);
    }
}
