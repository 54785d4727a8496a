//! Which runs a comparison has: methods, seeds, and what is tuned.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;

use super::record::RunName;
use crate::choice::name;
use crate::config::{Options, Preset, Settings, numbers};
use crate::train;

/// A method by its name.
#[derive(Clone, Debug)]
pub struct Method {
    pub name: String,
    options: Options,
}

impl Method {
    /// A preset, or a TOML file of options, whose name is the file's.
    ///
    /// # Errors
    /// Names what is neither.
    pub fn parse(given: &str) -> Result<Self> {
        if let Ok(preset) = Preset::from_str(given, false) {
            let options = Options { preset: Some(preset), ..Default::default() };
            return Ok(Self { name: given.into(), options });
        }
        ensure!(
            !given.trim().is_empty(),
            "--methods: an entry between the commas is empty; give names or files"
        );
        let path = Path::new(given);
        let presets = || Preset::value_variants().iter().map(|p| name(*p)).collect::<Vec<_>>();
        ensure!(
            path.extension().is_some_and(|e| e == "toml"),
            "--methods {given}: is no preset ({}) and no TOML file",
            presets().join(", ")
        );
        let stem = path.file_stem().and_then(|s| s.to_str());
        let own = stem.ok_or_else(|| anyhow!("--methods {given}: has a name that is not UTF-8"))?;
        let options = Options::read(path, "--methods")?;
        ensure!(
            options.seed.is_none(),
            "--methods {given}: has a seed, and seeds are the comparison's; leave it out"
        );
        Ok(Self { name: own.into(), options })
    }
}

/// What all runs of a comparison share, or what a method is.
const NEVER_TUNED: [&str; 16] = [
    "seed",
    "preset",
    "model",
    "model-config",
    "vae",
    "text-encoder",
    "device",
    "reward",
    "watch",
    "features",
    "prompt",
    "prompts",
    "eval-prompt",
    "eval-prompts",
    "eval-images",
    "resolution",
];

/// A setting and the values that each method has to choose from.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    pub key: String,
    pub values: Vec<String>,
}

impl std::str::FromStr for Tuned {
    type Err = anyhow::Error;

    fn from_str(given: &str) -> Result<Self> {
        let (key, values) = given.split_once('=').ok_or_else(|| {
            anyhow!("--tune {given}: give KEY=VALUE,VALUE,.. such as learning-rate=1e-3,3e-3")
        })?;
        let values: Vec<String> = values.split(',').map(|v| v.trim().to_string()).collect();
        ensure!(
            values.iter().all(|v| !v.is_empty()),
            "--tune {given}: has an empty value; give KEY=VALUE,VALUE,.."
        );
        let key = key.trim().trim_start_matches("--").to_string();
        for (i, value) in values.iter().enumerate() {
            let number = |v: &String| v.parse::<f64>().ok();
            let same = |v: &String| v == value || number(v).is_some() && number(v) == number(value);
            ensure!(!values[..i].iter().any(same), "--tune {given}: {value} stands there twice");
        }
        ensure!(
            !NEVER_TUNED.contains(&key.as_str()),
            "--tune {key}: is what methods are compared by; give it once, for all of them"
        );
        let tuned = Self { key, values };
        tuned.values.iter().try_for_each(|v| tuned.option(v).map(drop))?;
        Ok(tuned)
    }
}

impl Tuned {
    /// The options that a value makes.
    fn option(&self, value: &str) -> Result<Options> {
        let parse = |text: String| toml::from_str::<Options>(&text);
        let own = parse(format!("{} = {value}", self.key))
            .or_else(|_| parse(format!("{} = {value:?}", self.key)));
        own.map_err(|e| {
            let why = e.message().to_string();
            anyhow!("--tune {}={value}: is not a setting of train: {why}", self.key)
        })
    }
}

/// One value of each setting that is tuned.
pub type Choice = BTreeMap<String, String>;

/// A run to be done.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    pub name: RunName,
    /// Below `runs` and, as a record, below `records`.
    pub place: PathBuf,
    pub settings: Settings,
}

/// A comparison.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub methods: Vec<Method>,
    pub seeds: u64,
    pub tune: Vec<Tuned>,
    /// Seeds by which a method chooses, apart from the others.
    pub tune_seeds: u64,
    /// What all runs are told; a method's own options win.
    pub options: Options,
}

/// Distance of the tuning's seed from the first.
const TUNING: u64 = 1000;
/// Seeds at most, so that no one of them is the tuning's.
pub const MOST_SEEDS: u64 = TUNING;

impl Comparison {
    /// A method's run with one choice of what is tuned.
    fn run(&self, method: &Method, seed: u64, choice: &Choice) -> Result<PlannedRun> {
        let mut options = method.options.over(&self.options)?;
        for (key, value) in choice {
            let own = Tuned { key: key.clone(), values: Vec::new() }.option(value)?;
            options = own.over(&options)?;
        }
        let options = Options { seed: Some(seed), ..options };
        let settings = options.resolve().with_context(|| format!("method {}", method.name))?;
        let parts: Vec<String> = choice.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let mut place = PathBuf::from(&method.name);
        if !parts.is_empty() {
            place.push(parts.join(","));
        }
        place.push(format!("seed-{seed}"));
        let name = RunName { method: method.name.clone(), seed, tuned: choice.clone() };
        Ok(PlannedRun { name, place, settings })
    }

    fn first_seed(&self) -> u64 {
        self.options.seed.unwrap_or(0)
    }

    /// All choices of what is tuned; none where nothing is.
    fn choices(&self) -> Vec<Choice> {
        if self.tune.is_empty() {
            return Vec::new();
        }
        let mut choices = vec![Choice::new()];
        for tuned in &self.tune {
            let with = |choice: &Choice| {
                let one = |value: &String| {
                    let mut more = choice.clone();
                    more.insert(tuned.key.clone(), value.clone());
                    more
                };
                tuned.values.iter().map(one).collect::<Vec<_>>()
            };
            choices = choices.iter().flat_map(with).collect();
        }
        choices
    }

    /// The runs by which a method chooses: of each choice one a seed of the tuning.
    ///
    /// # Errors
    /// When a method's settings do not fit.
    pub fn tuning(&self, method: &Method) -> Result<Vec<PlannedRun>> {
        let first = self.first_seed() + TUNING;
        let all = |choice: &Choice| {
            let seeds = (0..self.tune_seeds).map(|i| self.run(method, first + i, choice));
            seeds.collect::<Result<Vec<_>>>()
        };
        let runs: Vec<Vec<PlannedRun>> = self.choices().iter().map(all).collect::<Result<_>>()?;
        Ok(runs.concat())
    }

    /// Whether all methods can be run, and are evaluated on the same model's pictures.
    ///
    /// # Errors
    /// Names the method or the flag that does not fit.
    pub fn check(&self) -> Result<()> {
        let last = self.first_seed().saturating_add(2 * TUNING);
        numbers::fits_toml("--seed and what --seeds adds", last)?;
        let mut first: Option<PlannedRun> = None;
        for method in &self.methods {
            let of_method = || format!("method {}", method.name);
            // Seeds make no difference to what fits.
            for run in self.tuning(method)?.iter().step_by(self.tune_seeds as usize) {
                train::check(&run.settings).with_context(of_method)?;
            }
            let runs = self.runs(method, &Choice::new())?;
            // What is tuned may be what makes the rest fit.
            for run in runs.iter().take(usize::from(self.tune.is_empty())) {
                train::check(&run.settings).with_context(of_method)?;
            }
            for run in runs {
                let Some(first) = &first else {
                    first = Some(run);
                    continue;
                };
                let (own, others) =
                    (run.settings.evaluation_prompts(), first.settings.evaluation_prompts());
                let same = own.len() == others.len()
                    && own.iter().zip(others).all(|(a, b)| a.text == b.text)
                    && run.settings.eval_images == first.settings.eval_images;
                let rewards = |run: &PlannedRun| {
                    let all = run.settings.reward.iter().map(|r| r.given.clone());
                    (all.collect::<Vec<_>>(), run.settings.mix)
                };
                ensure!(
                    run.settings.model == first.settings.model,
                    "--methods {}, {}: are of other models, which cannot be compared",
                    first.name.method,
                    method.name
                );
                ensure!(
                    rewards(&run) == rewards(first),
                    "--methods {}, {}: are trained on other rewards, which cannot be compared",
                    first.name.method,
                    method.name
                );
                ensure!(
                    same,
                    "--methods {}, {}: are evaluated on other pictures; give --eval-prompts FILE \
                     and --eval-images",
                    first.name.method,
                    method.name
                );
            }
        }
        Ok(())
    }

    /// A method's runs with what was found for it.
    ///
    /// # Errors
    /// When its settings do not fit.
    pub fn runs(&self, method: &Method, choice: &Choice) -> Result<Vec<PlannedRun>> {
        let first = self.first_seed();
        (0..self.seeds).map(|i| self.run(method, first + i, choice)).collect()
    }
}
