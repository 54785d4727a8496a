//! Models that are one file, in the layout of their authors: Stable Diffusion 1 and 2, SDXL, Stable
//! Diffusion 3 and FLUX.1, with or without text encoders and VAE. Family and sizes come from the
//! tensors' names and shapes, the rest are constants of the family; each part is given diffusers'
//! names and a configuration, and is from there on like one of a folder.

mod part;
mod text;
mod transformer;
mod unet;
mod vae;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::component::Component;
use super::family::Family;
use crate::io::weights::Weights;
use crate::schedule::PredictionType;

use self::part::Part;
pub use self::text::{Kind, is_t5, text_encoder_of};
pub use self::vae::vae_of;

/// Where the network's tensors begin: in a file of several parts, or of it alone.
const NETWORK: [&str; 2] = ["model.diffusion_model.", ""];

/// A model that is one file.
pub struct SingleFile {
    pub family: Family,
    /// By the names of their folders in diffusers' layout.
    parts: BTreeMap<&'static str, Component>,
    whole: Weights,
    /// Whether its UNet is one of Stable Diffusion 2, whose networks predict either.
    second: bool,
    /// Whether it takes the guidance scale as an input (FLUX.1-dev).
    guided: bool,
}

impl SingleFile {
    /// Finds out what a file holds; `configs` is a folder of configurations that win over what is
    /// made of the tensors, `prediction` what is said of the network's.
    ///
    /// # Errors
    /// When it holds no network of a known family, or a part that is not supported.
    pub fn open(
        path: &Path,
        configs: Option<&Path>,
        prediction: Option<PredictionType>,
    ) -> Result<Self> {
        let whole = Weights::open_any(path)?;
        refuse(&whole)?;
        let found = NETWORK.iter().find_map(|prefix| Network::of(&whole, prefix));
        let network = found.with_context(|| unknown(&whole))?;
        let (family, tensors) = (network.family, network.tensors);
        let mut found: Vec<(&'static str, Part)> = Vec::new();
        let encoders = text::parts_of(&whole, family)?;
        let (second, guided) = (network.second, tensors.has("guidance_in.in_layer.weight"));
        let net = match family {
            Family::StableDiffusion | Family::StableDiffusionXl => {
                let pooled = encoders.iter().find(|(name, _)| *name == "text_encoder_2");
                let pooled = pooled.and_then(|(_, part)| part.config["projection_dim"].as_u64());
                let traits = unet::Traits {
                    xl: family == Family::StableDiffusionXl,
                    second,
                    predicts_v: prediction.or(prediction_of(&whole)?)
                        == Some(PredictionType::VPrediction),
                    pooled: pooled.map(|n| n as usize),
                };
                unet::part(tensors, &traits)?
            }
            Family::StableDiffusion3 => transformer::sd3(tensors)?,
            Family::Flux => transformer::flux(tensors)?,
            Family::Flux2 | Family::ZImage => bail!(folder_alone(path)),
        };
        found.push((family.network(), net));
        for prefix in ["first_stage_model.", "vae."] {
            let tensors = whole.view(prefix);
            if tensors.has("decoder.conv_in.weight") {
                found.push(("vae", vae::part(tensors, family)?));
                break;
            }
        }
        found.extend(encoders);
        let mut parts = BTreeMap::new();
        for (name, part) in found {
            let part = part.component(path, name);
            let given = configs.map(|dir| dir.join(name));
            let part = match given {
                Some(dir) => part.configured(&dir)?,
                None => part,
            };
            parts.insert(name, part);
        }
        if let Some(configs) = configs {
            let asked = Family::of_network(&parts[family.network()].config)?;
            ensure!(
                asked == family,
                "--model-config {}: is of another family than the file",
                configs.display()
            );
        }
        Ok(Self { family, parts, whole, second, guided })
    }

    /// Whether a part is there, by its folder's name in diffusers' layout.
    pub fn has(&self, part: &str) -> bool {
        self.parts.contains_key(part)
    }

    /// The names of the parts that are there.
    pub fn parts(&self) -> impl Iterator<Item = &'static str> {
        self.parts.keys().copied()
    }

    /// A part.
    ///
    /// # Errors
    /// When it is not there.
    pub fn part(&self, part: &str) -> Result<Component> {
        let found = self.parts.get(part);
        found.cloned().with_context(|| format!("{}: holds no {part}", self.path().display()))
    }

    fn path(&self) -> &Path {
        self.whole.source()
    }

    /// Whether an encoder is open_clip's, whose texts are filled up with "!".
    pub fn is_open_clip(&self, encoder: &str) -> bool {
        match self.family {
            Family::StableDiffusion => self.second,
            Family::StableDiffusionXl | Family::StableDiffusion3 => encoder == "text_encoder_2",
            Family::Flux | Family::Flux2 | Family::ZImage => false,
        }
    }

    /// What its scheduler_config.json would say.
    ///
    /// # Errors
    /// When neither the file nor `given` says what a network of Stable Diffusion 2 predicts.
    pub fn scheduler(&self, given: Option<PredictionType>) -> Result<Value> {
        let flow = |fields: Value| {
            let mut all = json!({
                "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000
            });
            all.as_object_mut()
                .expect("an object")
                .extend(fields.as_object().cloned().expect("one"));
            all
        };
        match self.family {
            Family::StableDiffusion3 => return Ok(flow(json!({ "shift": 3.0 }))),
            Family::Flux if self.guided => {
                return Ok(flow(json!({
                    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
                    "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": true
                })));
            }
            Family::Flux => return Ok(flow(json!({ "shift": 1.0 }))),
            Family::Flux2 | Family::ZImage => bail!(folder_alone(self.path())),
            Family::StableDiffusion | Family::StableDiffusionXl => {}
        }
        let own = given.or(prediction_of(&self.whole)?);
        let prediction = match own {
            Some(prediction) => prediction,
            None if self.second => bail!(
                "{}: does not say what its network predicts, and Stable Diffusion 2 has both \
                 kinds: give --prediction-type epsilon (the base models, of 512 pixels) or \
                 --prediction-type v_prediction (those of 768)",
                self.path().display()
            ),
            None => PredictionType::Epsilon,
        };
        // What trainers of SDXL put into files of zero terminal SNR.
        let zero = self.whole.has("ztsnr");
        Ok(json!({
            "_class_name": "DDIMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": false,
            "num_train_timesteps": 1000,
            "prediction_type": crate::choice::name(prediction),
            "rescale_betas_zero_snr": zero,
            "set_alpha_to_one": false,
            "steps_offset": 1,
            "timestep_spacing": if zero { "trailing" } else { "leading" },
        }))
    }

    /// SHA-256 over the file, for checkpoints.
    pub fn add_to_hash(&self, hasher: &mut sha2::Sha256) {
        self.whole.add_to_hash(hasher);
    }
}

/// Whether a path is a model that is one file, rather than an adapter or a folder.
///
/// # Errors
/// When it is a file that cannot be read.
pub fn is_one(path: &Path) -> Result<bool> {
    if !path.is_file() {
        return Ok(false);
    }
    let whole = Weights::open_any(path)?;
    Ok(NETWORK.iter().any(|prefix| Network::of(&whole, prefix).is_some()))
}

/// What the file says of the network's prediction, in its metadata or by a tensor of that name.
fn prediction_of(whole: &Weights) -> Result<Option<PredictionType>> {
    if whole.has("v_pred") {
        return Ok(Some(PredictionType::VPrediction));
    }
    let said = |key: &str| whole.metadata(key);
    if let Some(text) = said("modelspec.prediction_type")? {
        return match text.to_lowercase().as_str() {
            "v" | "v_prediction" | "v-prediction" => Ok(Some(PredictionType::VPrediction)),
            "epsilon" | "eps" => Ok(Some(PredictionType::Epsilon)),
            _ => bail!(
                "{}: metadata modelspec.prediction_type = {text:?} is not supported; epsilon and v \
                 are",
                whole.source().display()
            ),
        };
    }
    let v = said("ss_v_parameterization")?.is_some_and(|text| text.eq_ignore_ascii_case("true"));
    Ok(v.then_some(PredictionType::VPrediction))
}

/// Refuses what looks like a model of these families, and is none.
fn refuse(whole: &Weights) -> Result<()> {
    let path = whole.source().display();
    let own = |name: &str| NETWORK.iter().any(|prefix| whole.has(&format!("{prefix}{name}")));
    let refiner = whole.has("conditioner.embedders.0.model.ln_final.weight");
    ensure!(!refiner, "{path}: is SDXL's refiner, which is not supported; the base model is");
    let diffusers =
        ["down_blocks.0.resnets.0.norm1.weight", "transformer_blocks.0.attn.to_q.weight"];
    ensure!(
        !diffusers.iter().any(|name| own(name)),
        "{path}: is a network in diffusers' layout, without the rest of its model; give the folder \
         that holds model_index.json"
    );
    let scaled = whole.names().find(|n| n.ends_with(".scale_weight") || *n == "scaled_fp8");
    if let Some(name) = scaled {
        bail!(
            "{path}: its f8 weights have scales of their own ({name}), which are not supported; \
             take a file in f16, bf16 or plain f8"
        );
    }
    Ok(())
}

fn folder_alone(path: &Path) -> String {
    format!(
        "{}: is FLUX.2 or Z-Image in one file, which is not supported; give diffusers' folder of \
         it, the one that holds model_index.json",
        path.display()
    )
}

fn unknown(whole: &Weights) -> String {
    let some: Vec<&str> = whole.names().take(3).collect();
    format!(
        "{}: holds no network of Stable Diffusion 1 or 2, SDXL, Stable Diffusion 3 or FLUX.1 in \
         its authors' layout (it begins with {})",
        whole.source().display(),
        some.join(", ")
    )
}

/// A network in a file.
struct Network {
    family: Family,
    second: bool,
    tensors: Weights,
}

impl Network {
    /// The network below a prefix, if there is one.
    fn of(whole: &Weights, prefix: &str) -> Option<Self> {
        let has = |name: &str| whole.has(&format!("{prefix}{name}"));
        let xl = has("label_emb.0.0.weight");
        let family = if has("input_blocks.0.0.weight") && xl {
            Family::StableDiffusionXl
        } else if has("input_blocks.0.0.weight") {
            Family::StableDiffusion
        } else if has("joint_blocks.0.x_block.attn.qkv.weight") {
            Family::StableDiffusion3
        } else if has("double_stream_modulation_img.lin.weight") {
            Family::Flux2
        } else if has("double_blocks.0.img_attn.qkv.weight") {
            Family::Flux
        } else if has("cap_embedder.1.weight") && has("x_pad_token") {
            Family::ZImage
        } else {
            return None;
        };
        let tensors = whole.view(prefix);
        // Its projections are linear layers; those of the first are convolutions.
        let projection = tensors.names().find(|n| n.ends_with(".proj_in.weight"));
        let linear = projection.and_then(|n| tensors.shape(n)).is_some_and(|s| s.len() == 2);
        let second = family == Family::StableDiffusion && linear;
        Some(Self { family, second, tensors })
    }
}
