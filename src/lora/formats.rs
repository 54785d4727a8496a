//! Adapters as safetensors: diffusers' keys (which peft made and ComfyUI reads too) and kohya's for
//! A1111. Keys begin with the network's place in the pipeline, `unet` or `transformer`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::adapter::{Adapter, Layer, LayerShape};
use super::label::{HASH, Label, hash};
use crate::io::tensors::{HostTensor, write_tensors};
use crate::io::weights::Weights;

/// File layouts of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `unet.X.lora_A.weight`, for diffusers' `load_lora_weights`.
    Diffusers,
    /// `lora_unet_X.lora_down.weight`, for A1111 and ComfyUI, as sd-scripts writes it: an SDXL
    /// UNet's layers have its authors' names (`input_blocks_4_1_..`).
    Kohya,
    /// The same with diffusers' names of all layers (`down_blocks_1_..`).
    KohyaDiffusers,
}

fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// Rows of a convolution's A, `[inputs, rank]`, that stand place by place, channel by channel.
fn by_channel(a: &[f32], channels: usize, places: usize, rank: usize) -> Vec<f32> {
    let row = |i: usize| (i % places) * channels + i / places;
    (0..channels * places).flat_map(|i| &a[row(i) * rank..][..rank]).copied().collect()
}

/// diffusers keeps rank and alpha in the file's metadata, one JSON string.
fn diffusers_metadata(adapter: &Adapter, network: &str) -> String {
    let mut targets: Vec<&str> = adapter.layers.iter().map(|l| l.name.as_str()).collect();
    targets.sort_unstable();
    let fields = json!({
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": targets,
        "init_lora_weights": "gaussian",
        "bias": "none",
    });
    let fields = fields.as_object().expect("an object").iter();
    let prefixed = fields.map(|(k, v)| (format!("{network}.{k}"), v.clone()));
    Value::Object(prefixed.collect()).to_string()
}

/// The adapter as named tensors in a format's keys and orientations; `network` is its place in the
/// pipeline.
pub fn tensors(adapter: &Adapter, format: Format, network: &str) -> Vec<HostTensor> {
    let r = adapter.rank;
    let mut out = Vec::new();
    for l in &adapter.layers {
        // Files hold PyTorch's [out, in], of convolutions [out, in, kernel, kernel].
        let up = transpose(&l.b, r);
        let (down, down_shape, up_shape) = match l.kernel {
            None => (transpose(&l.a, l.inputs), vec![r, l.inputs], vec![l.outputs, r]),
            Some(k) => {
                let channels = l.inputs / (k * k);
                let down = transpose(&by_channel(&l.a, channels, k * k, r), l.inputs);
                (down, vec![r, channels, k, k], vec![l.outputs, r, 1, 1])
            }
        };
        match format {
            Format::Diffusers => {
                let key = |side: &str| format!("{network}.{}.lora_{side}.weight", l.name);
                out.push(HostTensor::new(key("A"), down_shape, down));
                out.push(HostTensor::new(key("B"), up_shape, up));
            }
            Format::Kohya | Format::KohyaDiffusers => {
                let own = match format {
                    Format::Kohya => l.original.as_ref().unwrap_or(&l.name),
                    Format::Diffusers | Format::KohyaDiffusers => &l.name,
                };
                let name = format!("lora_{network}_{}", own.replace('.', "_"));
                let key = |part: &str| format!("{name}.{part}");
                out.push(HostTensor::new(key("lora_down.weight"), down_shape, down));
                out.push(HostTensor::new(key("lora_up.weight"), up_shape, up));
                out.push(HostTensor::new(key("alpha"), [], vec![adapter.alpha as f32]));
            }
        }
    }
    out
}

/// Writes an adapter.
///
/// # Errors
/// When the file cannot be written.
pub fn save(adapter: &Adapter, path: &Path, format: Format, label: &Label) -> Result<()> {
    let mut tensors = tensors(adapter, format, label.network);
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let mut metadata = label.about.clone();
    let mut add = |key: &str, value: String| metadata.insert(key.into(), value);
    match format {
        Format::Diffusers => {
            add("format", "pt".into());
            add("lora_adapter_metadata", diffusers_metadata(adapter, label.network));
        }
        Format::Kohya | Format::KohyaDiffusers => {
            add("ss_network_module", "networks.lora".into());
        }
    }
    add("ss_network_dim", adapter.rank.to_string());
    add("ss_network_alpha", adapter.alpha.to_string());
    add(HASH, hash(&tensors));
    let metadata: Vec<(&str, String)> = metadata.iter().map(|(k, v)| (&k[..], v.clone())).collect();
    write_tensors(path, &tensors, &metadata)
}

/// A network's place in a pipeline: what adapters' keys begin with.
const NETWORKS: [&str; 2] = ["unet", "transformer"];

/// Loads an adapter of diffusers', peft's or kohya's layout; `linears` are the network's layers.
///
/// # Errors
/// When a key is not known, a pair is incomplete, ranks differ, or a layer is not in the network.
pub fn load(path: &Path, linears: &[LayerShape]) -> Result<Adapter> {
    let mut adapter = read(path, linears)?;
    // The network's order, so that a loaded adapter has the parameters of a fresh one.
    let order: BTreeMap<&str, usize> =
        linears.iter().enumerate().map(|(i, l)| (l.name.as_str(), i)).collect();
    adapter.layers.sort_by_key(|l| order.get(l.name.as_str()).copied().unwrap_or(usize::MAX));
    adapter.fits(linears).with_context(|| path.display().to_string())?;
    for layer in &mut adapter.layers {
        if let Some(&i) = order.get(layer.name.as_str()) {
            layer.original = linears[i].original.clone();
            layer.kernel = linears[i].kernel;
        }
    }
    Ok(adapter)
}

/// Reads an adapter without its network: rank, alpha and sizes are right, names of kohya's layout
/// are left flat.
///
/// # Errors
/// As [`load`], but for layers that are not in the network.
pub fn read(path: &Path, linears: &[LayerShape]) -> Result<Adapter> {
    let file = Weights::open_file(path)?;
    let keys = Keys::of(&file, linears)?;
    let mut rank = None;
    let mut layers = Vec::new();
    for (module, [down, up]) in &keys.matrices {
        let [Some(down), Some(up)] = [down, up] else {
            bail!("{}: layer {module} has only one of its two matrices", path.display())
        };
        let layer = layer(path, module, file.f32(down)?, file.f32(up)?)?;
        let r = layer.a.len() / layer.inputs;
        let first = *rank.get_or_insert(r);
        ensure!(
            r == first,
            "{}: layer {module} has rank {r}, others {first}; one rank is supported",
            path.display()
        );
        layers.push(layer);
    }
    let rank = rank.ok_or_else(|| anyhow!("{}: holds no LoRA", path.display()))?;
    let mut alphas = Vec::new();
    for key in &keys.alphas {
        alphas.extend(file.f32(key)?.values.into_iter().map(f64::from));
    }
    alphas.extend(alpha_of_config(path, &file)?);
    // Without a word on alpha, diffusers takes it to equal the rank.
    let alpha = alphas.first().copied().unwrap_or(rank as f64);
    ensure!(
        alphas.iter().all(|&a| a == alpha),
        "{}: its layers differ in alpha; one alpha is supported",
        path.display()
    );
    ensure!(
        alpha.is_finite() && alpha > 0.0,
        "{}: alpha is {alpha}; a positive number is supported",
        path.display()
    );
    Ok(Adapter { rank, alpha, layers })
}

/// The keys of a file by what they are.
struct Keys {
    /// The matrices of each module, A and B.
    matrices: BTreeMap<String, [Option<String>; 2]>,
    /// kohya's alphas.
    alphas: Vec<String>,
}

impl Keys {
    fn of(file: &Weights, linears: &[LayerShape]) -> Result<Self> {
        let mut kohya = BTreeMap::new();
        for l in linears {
            for name in [Some(&l.name), l.original.as_ref()].into_iter().flatten() {
                kohya.insert(name.replace('.', "_"), l.name.clone());
            }
        }
        let mut keys = Self { matrices: BTreeMap::new(), alphas: Vec::new() };
        for key in file.names() {
            refuse_key(file, key)?;
            let split = split_key(key);
            let (module, side) = split.ok_or_else(|| {
                anyhow!("{}: key {key} is not that of a LoRA", file.source().display())
            })?;
            let module = module_name(module, &kohya);
            match side {
                Side::Down => keys.matrices.entry(module).or_default()[0] = Some(key.into()),
                Side::Up => keys.matrices.entry(module).or_default()[1] = Some(key.into()),
                Side::Alpha => keys.alphas.push(key.into()),
            }
        }
        Ok(keys)
    }
}

/// A module as the network names it; `kohya` has the names that flat ones stand for.
fn module_name(module: &str, kohya: &BTreeMap<String, String>) -> String {
    if let Some(flat) = NETWORKS.iter().find_map(|n| module.strip_prefix(&format!("lora_{n}_"))) {
        return kohya.get(flat).cloned().unwrap_or_else(|| flat.to_string());
    }
    let module = module.trim_start_matches("base_model.model.");
    let own = NETWORKS.iter().find_map(|n| module.strip_prefix(&format!("{n}.")));
    own.unwrap_or(module).to_string()
}

/// A layer of the file's two matrices, `[rank, in]` and `[out, rank]`.
fn layer(path: &Path, module: &str, down: HostTensor, up: HostTensor) -> Result<Layer> {
    let (d, u) = (&down.shape, &up.shape);
    let matrices = d.len() >= 2
        && u.len() >= 2
        && d[0] == u[1]
        && d.iter().chain(u).all(|&n| n > 0)
        && u[2..].iter().all(|&n| n == 1)
        && (d.len() == 4 && d[2] == d[3] || d[2..].iter().all(|&n| n == 1));
    ensure!(
        matrices,
        "{}: layer {module} has shapes {d:?} and {u:?}, not [rank, in] and [out, rank], nor \
         [rank, in, k, k] and [out, rank, 1, 1]",
        path.display()
    );
    let kernel = (d.len() == 4).then(|| d[2]);
    let places = kernel.map_or(1, |k| k * k);
    // Channel by channel in the file, place by place here.
    let by_place = by_channel(&transpose(&down.values, d[0]), places, d[1], d[0]);
    Ok(Layer {
        name: module.to_string(),
        original: None,
        kernel,
        inputs: d[1] * places,
        outputs: u[0],
        a: by_place,
        b: transpose(&up.values, u[0]),
    })
}

/// Alpha as the file's configuration has it: in diffusers' metadata, or in the file that peft's own
/// `save_pretrained` writes beside the weights.
fn alpha_of_config(path: &Path, file: &Weights) -> Result<Option<f64>> {
    if let Some(text) = file.metadata("lora_adapter_metadata")? {
        let source = format!("{}: metadata lora_adapter_metadata", path.display());
        let json: Value =
            serde_json::from_str(&text).with_context(|| format!("{source}: not valid JSON"))?;
        for network in NETWORKS {
            let field = |name: &str| json[format!("{network}.{name}")].clone();
            refuse_variants(&source, field)?;
            if let Some(alpha) = number(&source, "lora_alpha", &field("lora_alpha"))? {
                return Ok(Some(alpha));
            }
        }
        return Ok(None);
    }
    let beside = path.with_file_name("adapter_config.json");
    if !file.names().any(|k| k.starts_with("base_model.model.")) || !beside.is_file() {
        return Ok(None);
    }
    let config: Value = crate::io::read_json(&beside)?;
    let source = beside.display().to_string();
    refuse_variants(&source, |name| config[name].clone())?;
    number(&source, "lora_alpha", &config["lora_alpha"])
}

fn number(source: &str, name: &str, value: &Value) -> Result<Option<f64>> {
    match value {
        Value::Null => Ok(None),
        v => {
            let found = v.as_f64();
            found.map(Some).ok_or_else(|| anyhow!("{source}: {name} = {v} is not a number"))
        }
    }
}

/// Refuses what would change the adapter's scale or form: a file that is read as something else
/// would train or draw something else.
fn refuse_variants(source: &str, field: impl Fn(&str) -> Value) -> Result<()> {
    for name in ["use_rslora", "use_dora"] {
        ensure!(field(name) != true, "{source}: {name} = true is not supported");
    }
    let pattern = field("alpha_pattern");
    ensure!(
        pattern.is_null() || pattern.as_object().is_some_and(|o| o.is_empty()),
        "{source}: alpha_pattern = {pattern} is not supported; one alpha for all layers is"
    );
    Ok(())
}

/// Parts of pipelines that are not the network, as keys begin with them.
const ENCODERS: [&str; 5] = ["lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder"];

/// Kinds of adapters that are no LoRA, by how their keys end.
const KINDS: [(&str, &str); 8] = [
    (".dora_scale", "DoRA"),
    (".lora_magnitude_vector", "DoRA"),
    (".lora_magnitude_vector.weight", "DoRA"),
    (".hada_w1_a", "LoHa"),
    (".hada_w1_b", "LoHa"),
    (".lokr_w1", "LoKr"),
    (".lokr_w1_a", "LoKr"),
    (".oft_blocks", "OFT"),
];

/// Refuses keys that are known, and no LoRA of a network.
fn refuse_key(file: &Weights, key: &str) -> Result<()> {
    let path = file.source().display();
    ensure!(
        !ENCODERS.iter().any(|encoder| key.starts_with(encoder)),
        "{path}: key {key} is of a text encoder's LoRA; embeddings are made by the model's own \
         encoders, and without that part the adapter would be another one; take a file of the \
         network's layers alone"
    );
    if let Some((_, kind)) = KINDS.iter().find(|(end, _)| key.ends_with(end)) {
        bail!("{path}: key {key} is of a {kind} file; LoRA is supported");
    }
    Ok(())
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
