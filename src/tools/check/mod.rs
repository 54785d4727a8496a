//! `pcpo-wgpu check`: compares a model folder with a reference file that PyTorch and diffusers
//! wrote (`scripts/reference.py`). Format: docs/REFERENCE_FILES.md.

mod images;
mod subject;
mod text;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use self::subject::Subject;
pub use self::subject::{Asked, Comparison};
use self::text::PROMPT_EMBEDS;
use crate::device::tensor::{read, upload};
use crate::device::{Compute, guard};
use crate::io::tensors::HostTensor;
use crate::lora::formats;
use crate::model::conditioning::MicroConditioning;
use crate::model::pipeline::{TextFrom, Texts, embed};
use crate::model::reference::ReferenceTensors;
use crate::model::row_map::RowMap;
use crate::model::text::layout::TextLayout;
use crate::model::text::qwen3::Qwen3Config;
use crate::model::text::tokenizer::MOST_TOKENS;
use crate::model::vae::config::VaeConfig;
use crate::model::{Component, Conditioning, Denoiser, ModelFiles, ModelSpec};
use crate::sampling::policy::{GuidanceMode, Policy, PromptPair, Weighted};
use crate::sampling::trajectory::{Noise, sample};
use crate::schedule::{Grid, Sampler, Sampling};

/// `reference.json`, beside the reference file.
#[derive(Deserialize)]
struct ReferenceRun {
    prompts: Vec<String>,
    steps: usize,
    guidance: f64,
    eta: f64,
    /// Tokens of T5 or Qwen3 of a flow model's prompts.
    #[serde(default)]
    max_sequence_length: usize,
    /// Height and width in pixels, which SDXL is told; those of the latents where it is absent.
    resolution: Option<[usize; 2]>,
}

/// What of a model is there.
enum Parts {
    /// A network, with or without the rest of its model.
    Model(ModelFiles),
    /// One part by the name of its folder, and whether it is one of a whole model.
    Alone(&'static str, Component),
}

/// The classes of the parts besides a network.
const PARTS: [(&str, &[&str]); 2] = [
    ("vae", &["AutoencoderKL", "AutoencoderKLFlux2"]),
    ("text_encoder", &["CLIPTextModel", ARCHITECTURES[0], ARCHITECTURES[1]]),
];
const ARCHITECTURES: [&str; 2] = Qwen3Config::ARCHITECTURES;

impl Parts {
    /// A folder whose own configuration is a VAE's or an encoder's is that part alone; so is what
    /// lies in a model folder without a network.
    fn open(spec: &ModelSpec) -> Result<Vec<Self>> {
        let dir = &spec.model;
        let network = ["unet", "transformer"].iter().any(|part| dir.join(part).is_dir());
        if dir.is_file() || network {
            return Ok(vec![Self::Model(ModelFiles::open(spec)?)]);
        }
        ensure!(dir.is_dir(), "--model {}: no such folder or file", dir.display());
        let mut found = Vec::new();
        for (name, classes) in PARTS {
            let below = dir.join(name);
            if below.join("config.json").is_file() {
                found.push(Self::Alone(name, Component::folder(&below)?));
            } else if dir.join("config.json").is_file() {
                let own = Component::folder(dir)?;
                let json = &own.config.json;
                let is = |class: &&str| {
                    json["_class_name"] == **class || json["architectures"][0] == **class
                };
                if classes.iter().any(is) {
                    return Ok(vec![Self::Alone(name, own)]);
                }
            }
        }
        if found.is_empty() && dir.join("config.json").is_file() {
            found.push(Self::Model(ModelFiles::open(spec)?));
        }
        Ok(found)
    }
}

/// Runs every comparison that the model and the file allow.
///
/// # Errors
/// When a file is missing or damaged, a shape differs, or nothing can be compared.
pub fn check(asked: &Asked, compute: &Compute) -> Result<Vec<Comparison>> {
    let parts = Parts::open(&asked.model)?;
    let reference = ReferenceTensors::open(&asked.reference, &compute.burn)?;
    let s = Subject { asked, compute, reference };
    let mut lines = Vec::new();
    for part in &parts {
        lines.extend(guard(|| s.compare_part(part))?);
    }
    if lines.is_empty() {
        let (file, model) = (asked.reference.display(), asked.model.model.display());
        bail!("{file}: holds nothing that {model} can be checked against");
    }
    Ok(lines)
}

impl Subject<'_> {
    fn compare_part(&self, part: &Parts) -> Result<Vec<Comparison>> {
        match part {
            Parts::Alone("vae", vae) => self.vae(vae),
            Parts::Alone(_, encoder) => Ok(self.text_encoder(encoder)?.into_iter().collect()),
            Parts::Model(files) => self.model(files),
        }
    }

    fn model(&self, files: &ModelFiles) -> Result<Vec<Comparison>> {
        let (r, device) = (&self.reference, &self.compute.burn);
        let mut lines = Vec::new();
        let alone = r.has("out.prediction");
        let whole = r.has("out.latents") && r.has("in.latents") && self.is_whole(files);
        let (storage, stream) = (self.asked.storage, self.asked.stream);
        let stream = stream.then(|| files.stream(self.compute, storage)).transpose()?;
        let net = match alone || whole {
            true => Some(files.load_network(device, storage, stream)?),
            false => None,
        };
        if let Some(net) = net.as_ref().filter(|_| alone) {
            let lora = self.asked.lora.as_ref().map(|file| formats::load(file, &net.linears()));
            let lora = lora.transpose().context("--lora")?.map(|a| a.to_device(device));
            let found = net.forward_reference(r, lora.as_ref())?;
            lines.push(self.compare("prediction", "out.prediction", found)?);
        }
        ensure!(
            alone || self.asked.lora.is_none(),
            "--lora: {} has no out.prediction to compare with the adapter",
            r.path().display()
        );
        match files.family.text() {
            TextLayout::Clip if files.has("text_encoder") && r.has("in.input_ids") => {
                lines.extend(self.text_encoder(&files.component("text_encoder")?)?);
            }
            TextLayout::TwoClips => lines.extend(self.two_text_encoders(files)?),
            TextLayout::Qwen3(states) if files.has("text_encoder") => {
                lines.extend(self.qwen3(&files.component("text_encoder")?, states)?);
            }
            TextLayout::Clip
            | TextLayout::TwoClipsAndT5
            | TextLayout::T5AndPooledClip
            | TextLayout::Qwen3(_) => {}
        }
        if let Some(net) = net.as_ref().filter(|_| whole) {
            lines.extend(self.whole_run(files, &**net)?);
        }
        let images = r.has("out.image") || (r.has("out.encoded") && r.has("in.image"));
        if images && files.has("vae") {
            lines.extend(self.vae(&files.component("vae")?)?);
        }
        Ok(lines)
    }

    /// Whether the run of reference.json can be done: that file is there, and all parts but the
    /// VAE.
    fn is_whole(&self, files: &ModelFiles) -> bool {
        let encoders = files.family.text().held().iter().all(|part| files.has(part));
        let run = self.reference.path().with_file_name("reference.json").is_file();
        let own = match files.family.text() {
            TextLayout::Qwen3(_) => {
                run && files.has("text_encoder")
                    && files.chat_tokenizer().is_ok()
                    && files.scheduler().is_ok()
            }
            TextLayout::Clip
            | TextLayout::TwoClips
            | TextLayout::TwoClipsAndT5
            | TextLayout::T5AndPooledClip => files.file().is_none() || run,
        };
        encoders && !files.is_network_alone() && own
    }

    /// The run that reference.json describes: the prompts' embeddings where the file holds them,
    /// and the final latents.
    fn whole_run(&self, files: &ModelFiles, net: &dyn Denoiser) -> Result<Vec<Comparison>> {
        let (r, device) = (&self.reference, &self.compute.burn);
        let latents = r.tensor::<4>("in.latents")?;
        let path = r.path().with_file_name("reference.json");
        let run: ReferenceRun = crate::io::read_json(&path)?;
        let [rows, channels, h, w] = latents.dims();
        ensure!(
            run.prompts.len() == rows && rows > 0,
            "{}: {} prompts for {rows} latents",
            path.display(),
            run.prompts.len()
        );
        ensure!(
            run.eta == 0.0,
            "{}: eta = {}: a run with noise cannot be compared, its noise is another program's; \
             use 0",
            path.display(),
            run.eta
        );
        ensure!(
            channels == net.latent_shape()[0],
            "{}: in.latents has {channels} channels, the network {}",
            r.path().display(),
            net.latent_shape()[0]
        );
        net.accepts([h, w]).with_context(|| format!("{}: in.latents", r.path().display()))?;
        let pixels = match run.resolution {
            Some(pixels) => pixels,
            None if net.config().takes_time_ids() => {
                let factor = VaeConfig::read(&files.component("vae")?.config)?.factor();
                [h, w].map(|side| side * factor)
            }
            None => [h, w],
        };
        let qwen = matches!(files.family.text(), TextLayout::Qwen3(_));
        ensure!(
            !qwen || (1..=MOST_TOKENS).contains(&run.max_sequence_length),
            "{}: max_sequence_length = {}: must lie between 1 and {MOST_TOKENS}",
            path.display(),
            run.max_sequence_length
        );
        let prompts = self.encode(files, &run, pixels)?;
        let mut lines = self.embeddings(&prompts)?;
        let sampler = Sampler::of_pipelines(files.family.is_flow());
        let steps = files.schedule()?.steps(&Sampling {
            sampler,
            steps: run.steps,
            eta: run.eta,
            grid: Grid::Diffusers,
            shift: None,
            tokens: net.config().tokens([h, w]),
        })?;
        let uncond = prompts.uncond.at(&vec![0; rows]);
        let prompts = PromptPair { uncond, ..prompts };
        let policy = Policy {
            compute: self.compute,
            net,
            lora: None,
            guidance: GuidanceMode::new(net, run.guidance),
            prompts: &prompts,
        };
        let latents = upload(&read(&latents)?, latents.dims(), device);
        let noise = Noise { seed: 0, first_image: 0 };
        let each = RowMap::identity(rows);
        let found =
            sample(&[Weighted::whole(policy)], latents, &each, &steps, &[], noise, &|| Ok(()))?
                .latents;
        lines.push(self.compare_tensor("latents", "out.latents", &found)?);
        Ok(lines)
    }

    /// Embeddings of the run's prompts, and of no prompt.
    fn encode(
        &self,
        files: &ModelFiles,
        run: &ReferenceRun,
        pixels: [usize; 2],
    ) -> Result<PromptPair> {
        let device = &self.compute.burn;
        let texts = Texts { prompts: &run.prompts, negative: None };
        let from = TextFrom::Encoders(run.max_sequence_length);
        let embeddings = embed(files, texts, from, device, self.asked.storage)?;
        let rows: Vec<usize> =
            run.prompts.iter().map(|p| embeddings.row_of(p)).collect::<Result<_>>()?;
        let micro = MicroConditioning::default();
        let of = |rows: &[usize]| {
            let cond = embeddings.conditioning(rows, device)?;
            anyhow::Ok(cond.with_time_ids(micro.of(pixels)))
        };
        Ok(PromptPair { cond: of(&rows)?, uncond: of(&[embeddings.uncond()])? })
    }

    /// Checks that prompts have as many tokens as the reference's mask leaves of each.
    fn have_lengths(&self, found: &[usize], reference: &str) -> Result<()> {
        let mask = "in.attention_mask";
        if reference != PROMPT_EMBEDS || !self.reference.has(mask) {
            return Ok(());
        }
        let mask = self.reference.file.raw(mask)?.values;
        let rows = mask.chunks((mask.len() / found.len()).max(1));
        let expected: Vec<usize> =
            rows.map(|row| row.iter().filter(|v| **v != 0.0).count()).collect();
        ensure!(
            expected == found,
            "{}: the prompts have {expected:?} tokens by in.attention_mask, and {found:?} by the \
             model's tokenizer",
            self.reference.path().display()
        );
        Ok(())
    }

    fn embeddings(&self, prompts: &PromptPair) -> Result<Vec<Comparison>> {
        let sides: [(&Conditioning, [&'static str; 2], [&str; 2]); 2] = [
            (
                &prompts.cond,
                ["prompt_embeds", "pooled_prompt_embeds"],
                [PROMPT_EMBEDS, "out.pooled_prompt_embeds"],
            ),
            (
                &prompts.uncond,
                ["negative_prompt_embeds", "negative_pooled_embeds"],
                ["out.negative_prompt_embeds", "out.negative_pooled_prompt_embeds"],
            ),
        ];
        let mut lines = Vec::new();
        for (found, names, references) in &sides {
            if self.reference.has(references[0]) {
                let sequence = found.rows.spread(found.sequence.clone());
                let lengths = found.rows.of().iter().map(|&row| found.lengths.get(row));
                let lengths: Option<Vec<usize>> = lengths.map(Option::<&usize>::cloned).collect();
                lines.push(match lengths {
                    None => self.compare_tensor(names[0], references[0], &sequence)?,
                    Some(lengths) => {
                        let shape = sequence.dims();
                        let found = HostTensor::new(names[0], shape, read(&sequence)?);
                        let own = lengths.iter().flat_map(|n| (0..shape[1]).map(move |i| i < *n));
                        let own: Vec<bool> = own.collect();
                        self.have_lengths(&lengths, references[0])?;
                        self.compare_tokens(names[0], references[0], &found, &own)?
                    }
                });
            }
            if let (Some(pooled), true) = (&found.pooled, self.reference.has(references[1])) {
                let pooled = found.rows.spread(pooled.clone());
                lines.push(self.compare_tensor(names[1], references[1], &pooled)?);
            }
        }
        Ok(lines)
    }
}
