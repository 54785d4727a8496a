//! A model that is one file as a folder in diffusers' layout.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::io;
use crate::model::ModelFiles;
use crate::model::family::Family;
use crate::model::text::tokenizer::write_clip_vocabulary;

/// Writes a model's parts, its schedule and its tokenizers, whole or not at all; the names of the
/// folders that were written.
///
/// # Errors
/// When `out` is there already or cannot be written, or the file does not say what its network
/// predicts.
pub fn write_folder(files: &ModelFiles, out: &Path) -> Result<Vec<String>> {
    ensure!(!out.exists(), "{}: is there already; give a new folder", out.display());
    io::probe(&out.join("model_index.json"))?;
    // What the schedule lacks is asked for before anything large is written.
    files.schedule()?;
    let scheduler = files.scheduler()?;
    let mut parts = Vec::new();
    io::write_dir(out, |dir| {
        parts = fill(files, &scheduler, dir)?;
        Ok(())
    })?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(out, std::fs::Permissions::from_mode(0o755))
            .with_context(|| format!("{}: cannot be written", out.display()))?;
    }
    Ok(parts)
}

/// Writes all of it to a folder that is there.
fn fill(files: &ModelFiles, scheduler: &Value, dir: &Path) -> Result<Vec<String>> {
    let mut index = Map::new();
    index.insert("_class_name".into(), json!(pipeline(files.family)));
    let network = files.family.network();
    let layout = files.family.text();
    let encoders = layout.held().iter().copied().chain(layout.streamed());
    let mut parts = Vec::new();
    for part in [network, "vae"].into_iter().chain(encoders) {
        let encoder = part.starts_with("text_encoder");
        if !files.has(part) {
            // What a folder lacks is null there.
            index.insert(part.into(), json!([null, null]));
            if encoder {
                index.insert(part.replace("text_encoder", "tokenizer"), json!([null, null]));
            }
            continue;
        }
        let component = files.component(part)?;
        let config = &component.config.json;
        let class = if encoder { &config["architectures"][0] } else { &config["_class_name"] };
        let library = if encoder { "transformers" } else { "diffusers" };
        index.insert(part.into(), json!([library, class]));
        let stem = if encoder { "model" } else { "diffusion_pytorch_model" };
        let place = dir.join(part);
        component.weights()?.write(&place.join(format!("{stem}.safetensors")))?;
        write_json(&place.join("config.json"), config)?;
        parts.push(part.to_string());
        if encoder {
            let name = part.replace("text_encoder", "tokenizer");
            let t5 = config["model_type"] == "t5";
            let class = if t5 { "T5TokenizerFast" } else { "CLIPTokenizer" };
            let written = write_tokenizer(files, part, t5, &dir.join(&name))?;
            let entry = if written { json!(["transformers", class]) } else { json!([null, null]) };
            index.insert(name.clone(), entry);
            parts.extend(written.then_some(name));
        }
    }
    index.insert("scheduler".into(), json!(["diffusers", scheduler["_class_name"]]));
    write_json(&dir.join("scheduler").join("scheduler_config.json"), scheduler)?;
    parts.push("scheduler".into());
    if files.family == Family::StableDiffusionXl {
        let zeros = files.zeros_for_no_prompt()?;
        index.insert("force_zeros_for_empty_prompt".into(), json!(zeros));
    }
    write_json(&dir.join("model_index.json"), &Value::Object(index))?;
    Ok(parts)
}

/// The pipeline of diffusers that a family's folders are for.
fn pipeline(family: Family) -> &'static str {
    match family {
        Family::StableDiffusion => "StableDiffusionPipeline",
        Family::StableDiffusionXl => "StableDiffusionXLPipeline",
        Family::StableDiffusion3 => "StableDiffusion3Pipeline",
        Family::Flux => "FluxPipeline",
        Family::Flux2 => "Flux2KleinPipeline",
        Family::ZImage => "ZImagePipeline",
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    io::write(path, format!("{}\n", serde_json::to_string_pretty(value)?).as_bytes())
}

/// Writes a tokenizer: the folder that lies beside the file, or CLIP's own. None of T5, where none
/// lies there.
fn write_tokenizer(files: &ModelFiles, encoder: &str, t5: bool, to: &Path) -> Result<bool> {
    let name = encoder.replace("text_encoder", "tokenizer");
    let Some(from) = files.tokenizer_dir(&name) else {
        if !t5 {
            write_clip_vocabulary(to, files.pads_with_letter(encoder))?;
        }
        return Ok(!t5);
    };
    let entries = std::fs::read_dir(&from).with_context(|| from.display().to_string())?;
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        let path = entry.path();
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        io::write(&to.join(entry.file_name()), &bytes)?;
    }
    Ok(true)
}
