//! Rewards: a picture and its prompt to a number, higher is better. The set is open: [`REWARDS`]
//! lists what `--reward` names, and a library's user brings an own [`Reward`].

mod address;
mod aesthetic;
mod builtin;
mod clip;
mod command;
#[doc(hidden)]
pub mod http;
mod image_reward;
#[doc(hidden)]
pub mod judge;
mod open;
mod prompt;
mod remote;
mod score;
mod spec;

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};

use self::clip::Scale;
pub use self::open::{Opening, RewardContext};
pub use self::prompt::Prompt;
pub use self::remote::{DEFAULT_TIMEOUT, JudgeAnswer, RemoteOptions};
pub use self::score::{Reward, score};
pub use self::spec::RewardSpec;
use crate::model::clip::files::Files;

/// A reward that `--reward` can name.
pub struct Named {
    /// What stands before the colon.
    pub name: &'static str,
    /// What stands behind the colon, for people.
    pub argument: Option<&'static str>,
    /// Its model, where it has one.
    model: Option<Model>,
    /// Says what is wrong with its argument before anything is opened; the first text begins the
    /// error.
    check: fn(&str, &str) -> Result<()>,
    /// Makes it.
    open: fn(&Opening) -> Result<Box<dyn Reward>>,
}

/// What the memory estimate has to know of a reward's model.
struct Model {
    /// Its file or folder in the reward's argument.
    path: fn(&str) -> &str,
    /// Whether only the image encoder is loaded.
    vision_only: bool,
}

impl Model {
    const WHOLE: Self = Self { path: |path| path, vision_only: false };
}

/// What `--reward` can name; help texts and errors list it from here.
pub const REWARDS: [Named; 12] = [
    Named {
        name: "jpeg-compressibility",
        argument: None,
        model: None,
        check: |_, _| Ok(()),
        open: |_| Ok(Box::new(builtin::Jpeg { sign: -1.0 })),
    },
    Named {
        name: "jpeg-incompressibility",
        argument: None,
        model: None,
        check: |_, _| Ok(()),
        open: |_| Ok(Box::new(builtin::Jpeg { sign: 1.0 })),
    },
    Named {
        name: "symmetry",
        argument: None,
        model: None,
        check: |_, _| Ok(()),
        open: |_| Ok(Box::new(builtin::Symmetry)),
    },
    Named {
        name: "color",
        argument: Some("NAME"),
        model: None,
        check: |flag, name| builtin::Color::named(name).map(drop).with_context(|| flag.to_string()),
        open: |o| Ok(Box::new(builtin::Color::named(o.argument)?)),
    },
    Named {
        name: "clip-score",
        argument: Some("PATH"),
        model: Some(Model::WHOLE),
        check: |_, _| Ok(()),
        open: |o| Ok(Box::new(clip::DualEncoder::open(o, Scale::Cosine)?)),
    },
    Named {
        name: "pick-score",
        argument: Some("PATH"),
        model: Some(Model::WHOLE),
        check: |_, _| Ok(()),
        open: |o| Ok(Box::new(clip::DualEncoder::open(o, Scale::Logit)?)),
    },
    Named {
        name: "hps-v2.1",
        argument: Some("PATH"),
        model: Some(Model::WHOLE),
        check: |_, _| Ok(()),
        open: |o| Ok(Box::new(clip::DualEncoder::open(o, Scale::Hps)?)),
    },
    Named {
        name: "aesthetic",
        argument: Some("CLIP,HEAD"),
        model: Some(Model {
            path: |both| both.rsplit_once(',').map_or(both, |(clip, _)| clip),
            vision_only: true,
        }),
        check: |_, _| Ok(()),
        open: |o| Ok(Box::new(aesthetic::Aesthetic::open(o)?)),
    },
    Named {
        name: "image-reward",
        argument: Some("PATH"),
        model: Some(Model::WHOLE),
        check: |_, _| Ok(()),
        open: |o| Ok(Box::new(image_reward::ImageReward::open(o)?)),
    },
    Named {
        name: "http",
        argument: Some("URL"),
        model: None,
        check: http::check,
        open: |o| Ok(Box::new(http::Http::open(o.needs("URL")?, o.remote.timeout)?)),
    },
    Named {
        name: "judge",
        argument: Some("URL#MODEL"),
        model: None,
        check: judge::check,
        open: |o| Ok(Box::new(judge::Judge::open(o.needs("URL#MODEL")?, o.remote)?)),
    },
    Named {
        name: "command",
        argument: Some("PROGRAM"),
        model: None,
        check: command::check,
        open: |o| Ok(Box::new(command::Command::start(o.argument, o.remote.timeout)?)),
    },
];

/// All rewards in one line: `a, b and c:ARGUMENT`.
pub fn list() -> String {
    let mut all: Vec<String> = REWARDS
        .iter()
        .map(|r| r.argument.map_or(r.name.to_string(), |a| format!("{}:{a}", r.name)))
        .collect();
    let last = all.pop().unwrap_or_default();
    format!("{} and {last}", all.join(", "))
}

/// The reward that a name means, and its argument. A plain URL is `http:` with that URL.
///
/// # Errors
/// Names the value and what is supported.
pub fn find<'a>(flag: &str, spec: &'a str) -> Result<(&'static Named, &'a str)> {
    let (name, argument) = match spec.split_once(':') {
        Some(("http" | "https", rest)) if rest.starts_with("//") => ("http", Some(spec)),
        Some((name, argument)) => (name, Some(argument)),
        None => (spec, None),
    };
    let found = REWARDS.iter().find(|r| r.name == name);
    let named = found
        .ok_or_else(|| anyhow!("{flag} {}: unknown; {} are there", address::shown(spec), list()))?;
    ensure!(
        argument.is_none() || named.argument.is_some(),
        "{flag} {spec}: {name} takes nothing behind a colon; write {flag} {name}"
    );
    let argument = argument.unwrap_or_default();
    if named.argument.is_some() {
        (named.check)(&format!("{flag} {name}:{}", address::shown(argument)), argument)?;
    }
    Ok((named, argument))
}

/// Makes the reward that `--reward` names.
///
/// # Errors
/// Names the value and what is supported, or what its model or server lacks.
pub fn open(spec: &str, context: &RewardContext) -> Result<Box<dyn Reward>> {
    let (named, argument) = find("--reward", spec)?;
    (named.open)(&Opening::new(spec, argument, context))
}

/// Checks that what is said to a judge has one to hear it.
///
/// # Errors
/// Names the flag.
pub fn check_judge(specs: &[RewardSpec], question: bool, answer: bool) -> Result<()> {
    let judged = specs.iter().any(|r| r.reward.starts_with("judge:"));
    for (flag, given) in [("--judge-question", question), ("--judge-answer", answer)] {
        ensure!(!given || judged, "{flag}: is for --reward judge:URL#MODEL; leave it out");
    }
    Ok(())
}

/// Whether a reward of our own compares pictures with their prompts; servers and programs may.
///
/// # Errors
/// As [`find`].
pub fn reads_prompt(spec: &RewardSpec) -> Result<bool> {
    let (named, _) = find(spec.flag, &spec.reward)?;
    Ok(named.model.as_ref().is_some_and(|model| !model.vision_only))
}

/// Values of the weights of a reward's model that are loaded; 0 where it has none.
///
/// # Errors
/// When its files cannot be opened.
pub fn model_size(spec: &RewardSpec) -> Result<usize> {
    let (named, argument) = find(spec.flag, &spec.reward)?;
    let Some(model) = &named.model else { return Ok(0) };
    let files = Files::open(Path::new((model.path)(argument)), &[image_reward::FILE]);
    let files = files.with_context(|| format!("{} {}", spec.flag, spec.shown))?;
    Ok(if model.vision_only { files.vision_size() } else { files.weights.elements(|_| true) })
}
