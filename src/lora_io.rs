//! Adapters as safetensors: diffusers' keys (which peft made and ComfyUI reads too) and kohya's for A1111. Keys begin
//! with the network's place in the pipeline, `unet` or `transformer`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;

use crate::files::{Named, write_tensors};
use crate::lora::{Adapter, Layer};
use crate::model::Family;
use crate::model::nn::Linear;
use crate::model::weights::Weights;

/// File layouts of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `unet.X.lora_A.weight`, for diffusers' `load_lora_weights`.
    Diffusers,
    /// `lora_unet_X.lora_down.weight`, for A1111 and ComfyUI.
    Kohya,
}

fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// diffusers keeps rank and alpha in the file's metadata, one JSON string.
fn diffusers_metadata(adapter: &Adapter, network: &str) -> String {
    let mut targets: Vec<&str> = adapter.layers.iter().map(|l| l.name.as_str()).collect();
    targets.sort_unstable();
    let fields = serde_json::json!({
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": targets,
        "init_lora_weights": "gaussian",
        "bias": "none",
    });
    let fields = fields.as_object().expect("an object").iter();
    serde_json::Value::Object(fields.map(|(k, v)| (format!("{network}.{k}"), v.clone())).collect()).to_string()
}

/// The adapter as named tensors in a format's keys and orientations.
pub fn tensors(adapter: &Adapter, format: Format, family: Family) -> Vec<Named> {
    let (r, network) = (adapter.rank, family.network());
    let mut out = Vec::new();
    for l in &adapter.layers {
        // Files hold PyTorch's [out, in].
        let (down, up) = (transpose(&l.a, l.inputs), transpose(&l.b, r));
        match format {
            Format::Diffusers => {
                out.push((format!("{network}.{}.lora_A.weight", l.name), vec![r, l.inputs], down));
                out.push((format!("{network}.{}.lora_B.weight", l.name), vec![l.outputs, r], up));
            }
            Format::Kohya => {
                let name = format!("lora_{network}_{}", l.name.replace('.', "_"));
                out.push((format!("{name}.lora_down.weight"), vec![r, l.inputs], down));
                out.push((format!("{name}.lora_up.weight"), vec![l.outputs, r], up));
                out.push((format!("{name}.alpha"), vec![], vec![adapter.alpha as f32]));
            }
        }
    }
    out
}

/// Writes an adapter.
///
/// # Errors
/// When the file cannot be written.
pub fn save(adapter: &Adapter, path: &Path, format: Format, family: Family) -> Result<()> {
    let metadata = match format {
        Format::Diffusers => {
            vec![("format", "pt".to_string()), ("lora_adapter_metadata", diffusers_metadata(adapter, family.network()))]
        }
        Format::Kohya => vec![
            ("ss_network_module", "networks.lora".to_string()),
            ("ss_network_dim", adapter.rank.to_string()),
            ("ss_network_alpha", adapter.alpha.to_string()),
        ],
    };
    write_tensors(path, &tensors(adapter, format, family), &metadata)
}

/// A network's place in a pipeline: what adapters' keys begin with.
const NETWORKS: [&str; 2] = ["unet", "transformer"];

/// rank and alpha as written in diffusers' metadata, where they are.
fn alpha_from_metadata(path: &Path) -> Result<Option<f64>> {
    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let (_, header) =
        safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    let text = header.metadata().as_ref().and_then(|m| m.get("lora_adapter_metadata"));
    let json = text.and_then(|t| serde_json::from_str::<serde_json::Value>(t).ok());
    let alpha = |j: serde_json::Value| NETWORKS.iter().find_map(|n| j[format!("{n}.lora_alpha")].as_f64());
    if let Some(alpha) = json.and_then(alpha) {
        return Ok(Some(alpha));
    }
    // peft's own `save_pretrained` keeps alpha in a file beside the weights.
    let beside = path.with_file_name("adapter_config.json");
    if !header.tensors().keys().any(|k| k.starts_with("base_model.model.")) || !beside.is_file() {
        return Ok(None);
    }
    let config: serde_json::Value = crate::files::read_json(&beside)?;
    ensure!(config["use_rslora"] != true, "{}: use_rslora = true is not supported", beside.display());
    Ok(config["lora_alpha"].as_f64())
}

/// Loads an adapter of diffusers', peft's or kohya's layout; `linears` are the network's layers.
///
/// # Errors
/// When a key is not known, a pair is incomplete, ranks differ, or a layer is not in the network.
pub fn load(path: &Path, linears: &[&Linear]) -> Result<Adapter> {
    let mut adapter = read(path, linears)?;
    // The network's order, so that a loaded adapter has the parameters of a fresh one.
    let order: BTreeMap<&str, usize> = linears.iter().enumerate().map(|(i, l)| (l.name.as_str(), i)).collect();
    adapter.layers.sort_by_key(|l| order.get(l.name.as_str()).copied().unwrap_or(usize::MAX));
    adapter.fits(linears).with_context(|| path.display().to_string())?;
    Ok(adapter)
}

/// Reads an adapter without its network: rank, alpha and sizes are right, names of kohya's layout are left flat.
///
/// # Errors
/// As [`load`], but for layers that are not in the network.
pub fn read(path: &Path, linears: &[&Linear]) -> Result<Adapter> {
    let weights = Weights::open_file(path)?;
    let kohya: BTreeMap<String, &str> = linears.iter().map(|l| (l.name.replace('.', "_"), l.name.as_str())).collect();
    let mut found: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    let mut alphas: Vec<f64> = Vec::new();
    for key in weights.names() {
        let (module, side) =
            split_key(key).ok_or_else(|| anyhow!("{}: key {key} is not that of a LoRA", path.display()))?;
        let flat = NETWORKS.iter().find_map(|n| module.strip_prefix(&format!("lora_{n}_")));
        let module = match flat {
            Some(flat) => kohya.get(flat).map(|s| s.to_string()).unwrap_or_else(|| flat.to_string()),
            None => {
                let module = module.trim_start_matches("base_model.model.");
                let own = NETWORKS.iter().find_map(|n| module.strip_prefix(&format!("{n}.")));
                own.unwrap_or(module).to_string()
            }
        };
        match side {
            Side::Down => found.entry(module).or_default()[0] = Some(key.to_string()),
            Side::Up => found.entry(module).or_default()[1] = Some(key.to_string()),
            Side::Alpha => alphas.extend(weights.f32(key)?.0.iter().map(|&a| f64::from(a))),
        }
    }
    ensure!(!found.is_empty(), "{}: holds no LoRA", path.display());
    alphas.extend(alpha_from_metadata(path)?);
    let mut layers: BTreeMap<&str, Layer> = BTreeMap::new();
    let mut rank = None;
    for (module, keys) in &found {
        let [Some(down), Some(up)] = keys else {
            bail!("{}: layer {module} has only one of its two matrices", path.display())
        };
        let ((a, sa), (b, sb)) = (weights.f32(down)?, weights.f32(up)?);
        let matrices = sa.len() >= 2
            && sb.len() >= 2
            && sa[0] == sb[1]
            && sa[0] > 0
            && sa[2..].iter().chain(&sb[2..]).all(|&n| n == 1);
        ensure!(
            matrices,
            "{}: layer {module} has shapes {sa:?} and {sb:?}, not [rank, in] and [out, rank]",
            path.display()
        );
        let r = *rank.get_or_insert(sa[0]);
        ensure!(sa[0] == r, "{}: layer {module} has rank {}, others {r}; one rank is supported", path.display(), sa[0]);
        let layer =
            Layer { name: module.clone(), inputs: sa[1], outputs: sb[0], a: transpose(&a, r), b: transpose(&b, sb[0]) };
        layers.insert(module, layer);
    }
    let rank = rank.expect("at least one layer");
    // Without a word on alpha, diffusers takes it to equal the rank.
    let alpha = alphas.first().copied().unwrap_or(rank as f64);
    ensure!(
        alphas.iter().all(|&a| a == alpha),
        "{}: its layers differ in alpha; one alpha is supported",
        path.display()
    );
    Ok(Adapter { rank, alpha, layers: layers.into_values().collect() })
}

enum Side {
    Down,
    Up,
    Alpha,
}

fn split_key(key: &str) -> Option<(&str, Side)> {
    for (ending, down) in [
        (".lora_A.weight", true),
        (".lora_B.weight", false),
        (".lora_down.weight", true),
        (".lora_up.weight", false),
        (".lora.down.weight", true),
        (".lora.up.weight", false),
    ] {
        if let Some(module) = key.strip_suffix(ending) {
            return Some((module, if down { Side::Down } else { Side::Up }));
        }
    }
    key.strip_suffix(".alpha").map(|module| (module, Side::Alpha))
}
