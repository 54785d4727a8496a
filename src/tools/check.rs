//! `pcpo-wgpu check`: compares a model folder with a reference file that PyTorch and diffusers
//! wrote (`scripts/reference.py`). Format: docs/REFERENCE_FILES.md.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Tensor;
use clap::ValueEnum;
use serde::Deserialize;

use super::errors::relative_error;
use crate::device::tensor::{read, upload};
use crate::device::{Compute, guard};
use crate::io::tensors::HostTensor;
use crate::model::pipeline::load_schedule;
use crate::model::reference::ReferenceTensors;
use crate::model::row_map::RowMap;
use crate::model::text::TextEncoders;
use crate::model::text::clip::ClipText;
use crate::model::text::embeddings::fits;
use crate::model::vae::Vae;
use crate::model::{Conditioning, Denoiser, Family, Storage};
use crate::sampling::policy::{GuidanceMode, Policy, PromptPair, Weighted};
use crate::sampling::trajectory::{Noise, sample};
use crate::schedule::{Grid, Sampler, Sampling};

/// One line of the answer.
pub struct Comparison {
    pub name: &'static str,
    /// Largest absolute error over the reference's standard deviation; infinite where a value is
    /// not finite.
    pub error: f64,
}

/// `reference.json`, beside the reference file.
#[derive(Deserialize)]
struct ReferenceRun {
    prompts: Vec<String>,
    steps: usize,
    guidance: f64,
    eta: f64,
    /// T5 tokens of a flow model's prompts.
    #[serde(default)]
    max_sequence_length: usize,
}

/// A component's folder: below the model folder, or the folder itself.
fn component(dir: &Path, name: &str, classes: &[&str]) -> Result<Option<PathBuf>> {
    let below = dir.join(name);
    if below.join("config.json").is_file() {
        return Ok(Some(below));
    }
    let path = dir.join("config.json");
    if !path.exists() {
        return Ok(None);
    }
    let json: serde_json::Value = crate::io::read_json(&path)?;
    let own = |class: &&str| json["_class_name"] == **class || json["architectures"][0] == **class;
    Ok(classes.iter().any(own).then(|| dir.to_path_buf()))
}

/// What a folder's files are compared with.
struct Subject<'a> {
    model: &'a Path,
    family: Family,
    compute: &'a Compute,
    storage: Storage,
    reference: ReferenceTensors,
}

/// Runs every comparison that the folder and the file allow.
///
/// # Errors
/// When a file is missing or damaged, a shape differs, or nothing can be compared.
pub fn check(
    model: &Path,
    file: &Path,
    compute: &Compute,
    storage: Storage,
) -> Result<Vec<Comparison>> {
    ensure!(model.is_dir(), "--model {}: no such folder", model.display());
    let reference = ReferenceTensors::open(file, &compute.burn)?;
    let mut has_network = false;
    for f in Family::value_variants() {
        has_network |= component(model, f.network(), &[f.class()])?.is_some();
    }
    let family = if has_network { Family::of(model)? } else { Family::StableDiffusion };
    let s = Subject { model, family, compute, storage, reference };
    let lines = guard(|| s.compare_all(has_network))?;
    if lines.is_empty() {
        bail!("{}: holds nothing that {} can be checked against", file.display(), model.display());
    }
    Ok(lines)
}

impl Subject<'_> {
    fn compare_all(&self, has_network: bool) -> Result<Vec<Comparison>> {
        let (r, device) = (&self.reference, &self.compute.burn);
        let mut lines = Vec::new();
        let alone = has_network && r.has("out.prediction");
        let whole = r.has("out.latents") && self.is_whole();
        if alone || whole {
            let net = self.family.load(self.model, device, self.storage)?;
            if alone {
                let found = net.forward_reference(r, None)?;
                lines.push(self.compare("prediction", "out.prediction", found)?);
            }
            lines.extend(self.text_encoder()?);
            if whole {
                lines.extend(self.whole_run(&*net)?);
            }
        } else {
            lines.extend(self.text_encoder()?);
        }
        if let Some(dir) = component(self.model, "vae", &["AutoencoderKL"])? {
            lines.extend(self.vae(&dir)?);
        }
        Ok(lines)
    }

    fn compare(
        &self,
        name: &'static str,
        reference: &str,
        found: HostTensor,
    ) -> Result<Comparison> {
        let expected = self.reference.file.raw(reference)?;
        ensure!(
            expected.shape == found.shape,
            "{}: {reference} has shape {:?}, the model gives {:?}",
            self.reference.path().display(),
            expected.shape,
            found.shape
        );
        Ok(Comparison { name, error: relative_error(&found.values, &expected.values) })
    }

    fn compare_tensor<const D: usize>(
        &self,
        name: &'static str,
        reference: &str,
        found: &Tensor<D>,
    ) -> Result<Comparison> {
        self.compare(name, reference, HostTensor::new(name, found.dims(), read(found)?))
    }

    fn is_whole(&self) -> bool {
        let has = |part: &str| self.model.join(part).is_dir();
        has(self.family.network()) && has("text_encoder") && has("tokenizer") && has("scheduler")
    }

    /// CLIP's last hidden state against the sequence of a diffusion model.
    fn text_encoder(&self) -> Result<Option<Comparison>> {
        let r = &self.reference;
        let dir = component(self.model, "text_encoder", &["CLIPTextModel"])?;
        let Some(dir) = dir.filter(|_| r.has("in.input_ids")) else { return Ok(None) };
        let text = ClipText::load(&dir, &self.compute.burn, self.storage)?;
        let ids = r.file.raw("in.input_ids")?;
        let shape = &ids.shape;
        ensure!(
            shape.len() == 2 && shape.iter().all(|&n| n > 0),
            "{}: in.input_ids has shape {shape:?}, expected [B, T]",
            r.path().display()
        );
        let row = |row: &[f32]| row.iter().map(|&i| i as u32).collect();
        let ids: Vec<Vec<u32>> = ids.values.chunks(shape[1]).map(row).collect();
        let last = text.forward(&ids)?.last;
        let name = "encoder_hidden_states";
        self.compare_tensor(name, "in.encoder_hidden_states", &last).map(Some)
    }

    fn vae(&self, dir: &Path) -> Result<Vec<Comparison>> {
        let r = &self.reference;
        let vae = Vae::load(dir, &self.compute.burn, self.storage)?;
        let mut lines = Vec::new();
        let fitting = |name: &str, channels: usize| -> Result<Tensor<4>> {
            let x = r.tensor::<4>(name)?;
            ensure!(
                x.dims()[1] == channels && x.dims().iter().all(|&n| n > 0),
                "{}: {name} has shape {:?}, the VAE takes {channels} channels",
                r.path().display(),
                x.dims()
            );
            Ok(x)
        };
        if r.has("out.image") {
            let image = vae.decode(fitting("out.latents", vae.latent_channels)?);
            lines.push(self.compare_tensor("image", "out.image", &image)?);
        }
        if r.has("out.encoded") && r.has("in.image") {
            let latents = vae.encode(fitting("in.image", 3)?);
            lines.push(self.compare_tensor("encoded", "out.encoded", &latents)?);
        }
        Ok(lines)
    }

    /// The run that reference.json describes: the prompts' embeddings where the file holds them,
    /// and the final latents.
    fn whole_run(&self, net: &dyn Denoiser) -> Result<Vec<Comparison>> {
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
        let prompts = self.encode(net, &run)?;
        let mut lines = self.embeddings(&prompts)?;
        let sampler = Sampler::of_pipelines(self.family.is_flow());
        let steps = load_schedule(self.model)?.steps(&Sampling {
            sampler,
            steps: run.steps,
            eta: run.eta,
            grid: Grid::Diffusers,
            shift: None,
            tokens: net.tokens([h, w]),
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

    /// Embeddings of the run's prompts, and of the empty one.
    fn encode(&self, net: &dyn Denoiser, run: &ReferenceRun) -> Result<PromptPair> {
        let (device, context) = (&self.compute.burn, net.context());
        let layout = self.family.text();
        let (length, width) = (run.max_sequence_length, context[0]);
        let text = TextEncoders::load(self.model, layout, length, width, device, self.storage)?;
        fits(context, text.widths(), &self.model.display().to_string())?;
        let all = [&run.prompts[..], &[String::new()]].concat();
        let embeddings = text.encode(&all)?;
        let rows: Vec<usize> =
            run.prompts.iter().map(|p| embeddings.row_of(p)).collect::<Result<_>>()?;
        Ok(PromptPair {
            cond: embeddings.conditioning(&rows, device)?,
            uncond: embeddings.conditioning(&[embeddings.row_of("")?], device)?,
        })
    }

    fn embeddings(&self, prompts: &PromptPair) -> Result<Vec<Comparison>> {
        let sides: [(&Conditioning, [&'static str; 2], [&str; 2]); 2] = [
            (
                &prompts.cond,
                ["prompt_embeds", "pooled_prompt_embeds"],
                ["out.prompt_embeds", "out.pooled_prompt_embeds"],
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
                lines.push(self.compare_tensor(names[0], references[0], &sequence)?);
            }
            if let (Some(pooled), true) = (&found.pooled, self.reference.has(references[1])) {
                let pooled = found.rows.spread(pooled.clone());
                lines.push(self.compare_tensor(names[1], references[1], &pooled)?);
            }
        }
        Ok(lines)
    }
}
