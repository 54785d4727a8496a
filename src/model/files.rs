//! Where a model's parts come from: a folder in diffusers' layout, or one file in the layout of its
//! authors; and what is given in place of parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Device;
use serde_json::{Value, json};

use super::component::Component;
use super::denoiser::Denoiser;
use super::family::Family;
use super::loader::{PreparedWeights, Storage, Stream};
use super::single_file::{Kind, SingleFile, is_t5, text_encoder_of, vae_of};
use super::text::layout::TextLayout;
use crate::choice::name;
use crate::device::Compute;
use crate::device::system::available;
use crate::schedule::{PredictionType, Schedule};

/// What is said of a model: where it is, and what supplies or replaces parts of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSpec {
    /// A folder that holds model_index.json, the folder of its network alone, or a file.
    pub model: PathBuf,
    /// `--model-config`: a folder of diffusers' configurations, for what a file cannot say.
    pub config: Option<PathBuf>,
    /// `--vae`: a folder or a file.
    pub vae: Option<PathBuf>,
    /// `--text-encoder`: folders or files, in the order of the model's encoders; T5 is recognised.
    pub text_encoder: Vec<PathBuf>,
    /// `--prediction-type`
    pub prediction: Option<PredictionType>,
}

impl From<&Path> for ModelSpec {
    fn from(model: &Path) -> Self {
        Self { model: model.to_path_buf(), ..Self::default() }
    }
}

/// A model whose parts can be opened.
pub struct ModelFiles {
    pub spec: ModelSpec,
    pub family: Family,
    /// The model itself, where it is one file.
    file: Option<SingleFile>,
    /// What is kept of streamed blocks, for all devices.
    prepared: Arc<PreparedWeights>,
}

/// Share of the host's free memory that streamed blocks may take.
const ROOM: f64 = 0.75;

/// Where a folder's network is: in a folder of its own, or this folder itself.
fn network_dir(dir: &Path) -> Result<PathBuf> {
    let below = ["unet", "transformer"].into_iter().map(|part| dir.join(part));
    if let Some(found) = below.into_iter().find(|d| d.is_dir()) {
        return Ok(found);
    }
    ensure!(
        dir.join("config.json").is_file(),
        "--model {}: not a diffusers folder (there is no unet/ and no transformer/ in it); give \
         the folder that holds model_index.json, or one .safetensors file",
        dir.display()
    );
    Ok(dir.to_path_buf())
}

impl ModelFiles {
    /// Finds out what is there; nothing is read but configurations and lists of tensors.
    ///
    /// # Errors
    /// Names the flag, the file and what is missing, damaged or not supported.
    pub fn open(spec: &ModelSpec) -> Result<Self> {
        let path = &spec.model;
        ensure!(path.exists(), "--model {}: no such folder or file", path.display());
        if let Some(configs) = &spec.config {
            let shown = configs.display();
            ensure!(configs.is_dir(), "--model-config {shown}: no such folder");
            ensure!(
                !path.is_dir(),
                "--model-config {shown}: is for a model that is one file, and --model {} is a \
                 folder with configurations of its own; leave it out",
                path.display()
            );
        }
        if path.is_dir() {
            let network = Component::folder(&network_dir(path)?)?;
            let family = Family::of_network(&network.config)?;
            let prepared = Arc::default();
            return Ok(Self { spec: spec.clone(), family, file: None, prepared });
        }
        let file = SingleFile::open(path, spec.config.as_deref(), spec.prediction)
            .with_context(|| format!("--model {}", path.display()))?;
        let (spec, family, prepared) = (spec.clone(), file.family, Arc::default());
        Ok(Self { spec, family, file: Some(file), prepared })
    }

    /// A folder without flags.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn folder(dir: &Path) -> Result<Self> {
        Self::open(&dir.into())
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.spec.model
    }

    /// The path, for messages.
    pub fn shown(&self) -> std::path::Display<'_> {
        self.spec.model.display()
    }

    /// The file that the model is, where it is one.
    pub fn file(&self) -> Option<&SingleFile> {
        self.file.as_ref()
    }

    /// Whether it is of Stable Diffusion 2: its projections are linear layers.
    pub fn is_second(&self) -> bool {
        let linear = |network: Component| network.config.json["use_linear_projection"] == true;
        self.family == Family::StableDiffusion && self.network().is_ok_and(linear)
    }

    /// Whether a part is there, by its folder's name in diffusers' layout.
    pub fn has(&self, part: &str) -> bool {
        let supplied = self.supplied(part).is_ok_and(|found| found.is_some());
        supplied
            || match &self.file {
                Some(file) => file.has(part),
                None => self.path().join(part).join("config.json").is_file(),
            }
    }

    /// Whether it is the folder of a network alone.
    pub fn is_network_alone(&self) -> bool {
        self.file.is_none() && !self.path().join(self.family.network()).is_dir()
    }

    /// The network.
    ///
    /// # Errors
    /// When its configuration cannot be read.
    pub fn network(&self) -> Result<Component> {
        match &self.file {
            Some(file) => file.part(self.family.network()),
            None => {
                let mut network = Component::folder(&network_dir(self.path())?)?;
                // Of FLUX.2 the pipeline says whether its steps were distilled.
                if self.family == Family::Flux2 {
                    let distilled = self.of_pipeline("is_distilled", false)?;
                    network.config.json["is_distilled"] = json!(distilled);
                }
                Ok(network)
            }
        }
    }

    /// Loads the network, whose blocks are read when their turn comes where `stream` says so.
    ///
    /// # Errors
    /// As [`Family::load`].
    pub fn load_network(
        &self,
        device: &Device,
        storage: Storage,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Denoiser>> {
        self.family.load(&self.network()?, device, storage, stream)
    }

    /// Where its network's blocks are best read from when their turn comes: from the host's memory
    /// where the device has its own and the host has room for them.
    ///
    /// # Errors
    /// When the list of its tensors cannot be read.
    pub fn stream(&self, compute: &Compute, storage: Storage) -> Result<Stream> {
        let values = self.network()?.weights()?.elements(|_| true);
        let bytes = values as f64 * storage.bytes_per_value();
        let own = compute.gpu.is_some() && !compute.software;
        let room = bytes < ROOM * available() as f64;
        Ok(match own && room {
            true => Stream::FromHost(self.prepared.clone()),
            false => Stream::FromDisk,
        })
    }

    /// A part by its folder's name in diffusers' layout.
    ///
    /// # Errors
    /// Names what is missing, and the flag that supplies it.
    pub fn component(&self, part: &str) -> Result<Component> {
        if let Some(found) = self.supplied(part)? {
            return Ok(found);
        }
        match &self.file {
            Some(file) if file.has(part) => file.part(part),
            Some(_) => bail!(
                "--model {}: holds no {part}; give it by {}",
                self.shown(),
                if part == "vae" { "--vae DIR|FILE" } else { "--text-encoder DIR|FILE" }
            ),
            None => Component::folder(&self.path().join(part)),
        }
    }

    /// What a flag gives in place of a part.
    fn supplied(&self, part: &str) -> Result<Option<Component>> {
        let configured = |given: Component| match &self.spec.config {
            Some(configs) => given.configured(&configs.join(part)),
            None => Ok(given),
        };
        if part == "vae" {
            let Some(path) = &self.spec.vae else { return Ok(None) };
            return vae_of(path, self.family).and_then(configured).context("--vae").map(Some);
        }
        let layout = self.family.text();
        let one = matches!(layout, TextLayout::Qwen3(_));
        ensure!(
            !one || self.spec.text_encoder.len() < 2,
            "--text-encoder: stands there {} times, and the model has one text encoder",
            self.spec.text_encoder.len()
        );
        let shown = |path: &Path| format!("--text-encoder {}", path.display());
        let mut given = Vec::new();
        for path in &self.spec.text_encoder {
            // An encoder that is read layer by layer, rather than a CLIP.
            given.push((path, one || is_t5(path).with_context(|| shown(path))?));
        }
        // As many as a file lacks are for these; else they are in the order of the model's.
        let lacking = |part: &&&str| self.file.as_ref().is_some_and(|file| !file.has(part));
        let lacks: Vec<&str> = layout.held().iter().filter(lacking).copied().collect();
        let count = given.iter().filter(|(_, streamed)| !streamed).count();
        let places = if lacks.len() == count { &lacks } else { layout.held() };
        let mut clips = places.iter().copied();
        for (path, streamed) in given {
            let place = if streamed { layout.streamed() } else { clips.next() };
            let place = place.with_context(|| {
                format!("{}: the model has no place for another text encoder", shown(path))
            })?;
            if place == part {
                let kind = match place {
                    _ if one => Kind::Qwen3,
                    _ if streamed => Kind::T5,
                    "text_encoder" if self.is_second() => Kind::OpenShort,
                    "text_encoder" => Kind::Clip,
                    _ => Kind::Open,
                };
                let found = text_encoder_of(path, kind).and_then(configured);
                return found.with_context(|| shown(path)).map(Some);
            }
        }
        Ok(None)
    }

    /// The folder of configurations: a model's own, or the one that is given with a file.
    fn configs(&self) -> Option<&Path> {
        match self.file {
            Some(_) => self.spec.config.as_deref(),
            None => Some(self.path()),
        }
    }

    /// The scheduler's file, where the model has one.
    fn scheduler_file(&self) -> Option<PathBuf> {
        let path = self.configs()?.join("scheduler").join("scheduler_config.json");
        (self.file.is_none() || path.is_file()).then_some(path)
    }

    /// The scheduler's configuration.
    ///
    /// # Errors
    /// When it cannot be read, or a file does not say what its network predicts.
    pub fn scheduler(&self) -> Result<Value> {
        let mut config: Value = match (self.scheduler_file(), &self.file) {
            (None, Some(file)) => file.scheduler(self.spec.prediction)?,
            (Some(path), _) => crate::io::read_json(&path)?,
            (None, None) => bail!("--model {}: has no scheduler", self.shown()),
        };
        let source = || self.scheduler_file().unwrap_or_else(|| self.spec.model.clone());
        ensure!(config.is_object(), "{}: is not a JSON object", source().display());
        if let Some(prediction) = self.spec.prediction {
            ensure!(
                !self.family.is_flow(),
                "--prediction-type: is for diffusion models, and this is a flow model; leave it out"
            );
            config["prediction_type"] = json!(name(prediction));
        }
        Ok(config)
    }

    /// Reads the schedule.
    ///
    /// # Errors
    /// As [`Self::scheduler`] and [`Schedule::from_config`], and when the scheduler is of another
    /// family than the network.
    pub fn schedule(&self) -> Result<Schedule> {
        let config = self.scheduler()?;
        let source = match self.scheduler_file() {
            Some(path) => path.display().to_string(),
            None => self.shown().to_string(),
        };
        let mut schedule = Schedule::from_config(&config).with_context(|| source.clone())?;
        let predicts = if self.family.is_flow() {
            "a velocity; FlowMatchEulerDiscreteScheduler does"
        } else {
            "noise; DDIMScheduler does"
        };
        ensure!(
            self.family.is_flow() == matches!(schedule, Schedule::Flow(_)),
            "{source}: _class_name = {} does not fit the network, which predicts {predicts}",
            config["_class_name"]
        );
        if let Schedule::Flow(flow) = &mut schedule {
            flow.spacing = self.family.spacing();
        }
        Ok(schedule)
    }

    /// Whether zeros stand for the negative prompt where none is given, as SDXL's pipeline has it:
    /// `force_zeros_for_empty_prompt` in model_index.json, which is true where nothing is said.
    ///
    /// # Errors
    /// When the file is damaged, or the field no flag.
    pub fn zeros_for_no_prompt(&self) -> Result<bool> {
        match self.family {
            Family::StableDiffusionXl => self.of_pipeline("force_zeros_for_empty_prompt", true),
            Family::StableDiffusion
            | Family::StableDiffusion3
            | Family::Flux
            | Family::Flux2
            | Family::ZImage => Ok(false),
        }
    }

    /// A flag of model_index.json, where that is there and says anything.
    fn of_pipeline(&self, field: &str, default: bool) -> Result<bool> {
        let path = self.configs().map(|dir| dir.join("model_index.json")).filter(|p| p.is_file());
        let Some(path) = path else { return Ok(default) };
        let index: Value = crate::io::read_json(&path)?;
        match &index[field] {
            Value::Null => Ok(default),
            Value::Bool(on) => Ok(*on),
            other => bail!("{}: {field} = {other} is not true or false", path.display()),
        }
    }
}
