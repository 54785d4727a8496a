//! Reading safetensors: one file, a sharded set with its index, or an fp16 variant; f32, f16 and bf16.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

/// The type that frozen weights are stored in; computation is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    F32,
    F16,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// The tensors of one component, mapped into memory and read when asked for.
pub struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
    dir: PathBuf,
}

/// The candidates for a component's weight file, in the order in which they are tried.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        for suffix in ["", ".fp16"] {
            let one = dir.join(format!("{stem}{suffix}.safetensors"));
            if one.is_file() {
                return Ok(vec![one]);
            }
            let index = dir.join(format!("{stem}.safetensors.index{suffix}.json"));
            if index.is_file() {
                let json: serde_json::Value = crate::files::read_json(&index)?;
                let map = json["weight_map"]
                    .as_object()
                    .ok_or_else(|| anyhow!("{}: field weight_map is missing", index.display()))?;
                let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
                names.sort_unstable();
                names.dedup();
                return Ok(names.into_iter().map(|n| dir.join(n)).collect());
            }
        }
    }
    bail!(
        "{}: no weights found; expected diffusion_pytorch_model.safetensors or model.safetensors, \
         alone, as .fp16 variant or with an index (.bin files: convert them with diffusers)",
        dir.display()
    )
}

impl Weights {
    /// Opens the weights of a component folder (`unet`, `vae`, `text_encoder`).
    ///
    /// # Errors
    /// When no weight file is there, or one is truncated or not safetensors.
    pub fn open_dir(dir: &Path) -> Result<Self> {
        Self::open(&weight_files(dir)?, dir)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When the file is missing, truncated or not safetensors.
    pub fn open_file(file: &Path) -> Result<Self> {
        Self::open(&[file.to_path_buf()], file)
    }

    fn open(paths: &[PathBuf], dir: &Path) -> Result<Self> {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        for (i, path) in paths.iter().enumerate() {
            let file = std::fs::File::open(path).with_context(|| format!("{}: cannot be opened", path.display()))?;
            // SAFETY: the map is read-only; like every program that maps weights we rely on nobody truncating them.
            let map = unsafe { Mmap::map(&file) }.with_context(|| format!("{}: cannot be read", path.display()))?;
            let tensors = SafeTensors::deserialize(&map).map_err(|e| {
                anyhow!("{}: not a valid safetensors file ({e}); download or save it again", path.display())
            })?;
            for (name, view) in tensors.tensors() {
                let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
                let range = start..start + view.data().len();
                entries.insert(name, Entry { file: i, dtype: view.dtype(), shape: view.shape().to_vec(), range });
            }
            files.push((path.clone(), map));
        }
        Ok(Self { files, entries, dir: dir.to_path_buf() })
    }

    /// The folder or file that the tensors came from.
    pub fn source(&self) -> &Path {
        &self.dir
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| &e.shape[..])
    }

    /// SHA-256 over all files, for checkpoints.
    pub fn add_to_hash(&self, hasher: &mut sha2::Sha256) {
        use sha2::Digest;
        for (_, map) in &self.files {
            hasher.update(&map[..]);
        }
    }

    /// One tensor as f32 values with its shape; refuses values that are not finite.
    ///
    /// # Errors
    /// When it is missing, of another type, or holds a value that is not finite.
    pub fn f32(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>)> {
        let (values, shape) = self.raw(name)?;
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            let path = self.files[self.entries[name].file].0.display();
            bail!("{path}: tensor {name} holds {} at element {i}; the file is damaged", values[i]);
        }
        Ok((values, shape))
    }

    /// One tensor as f32 values with its shape; converts f16 and bf16.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn raw(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>)> {
        let e = self.entries.get(name).ok_or_else(|| anyhow!("{}: tensor {name} is missing", self.dir.display()))?;
        let path = self.files[e.file].0.display();
        let bytes = &self.files[e.file].1[e.range.clone()];
        let values: Vec<f32> = match e.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => bail!("{path}: tensor {name} has type {other:?}; F32, F16 and BF16 are supported"),
        };
        Ok((values, e.shape.clone()))
    }

    /// One tensor of a known shape, on the device, in f32.
    ///
    /// # Errors
    /// As [`Self::f32`], and when the shape differs.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D], device: &Device) -> Result<Tensor<D>> {
        let (values, found) = self.f32(name)?;
        // Linear layers that older versions stored as 1x1 convolutions, and the reverse, hold the same numbers.
        let trim = |s: &[usize]| s.iter().rev().skip_while(|n| **n == 1).count().max(1);
        ensure!(
            found[..trim(&found)] == shape[..trim(&shape)],
            "{}: tensor {name} has shape {found:?}, the configuration asks for {shape:?}",
            self.dir.display()
        );
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }
}

/// A place in a component's weights: the prefix of the names, where tensors go, and how they are stored.
#[derive(Clone)]
pub struct Loader<'a> {
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub storage: Storage,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub fn new(weights: &'a Weights, device: &'a Device, storage: Storage) -> Self {
        Self { weights, device, storage, prefix: String::new() }
    }

    /// The same, one level deeper.
    pub fn at(&self, part: impl std::fmt::Display) -> Self {
        Self { prefix: self.name(part), ..self.clone() }
    }

    /// The full name of a tensor or module below this place.
    pub fn name(&self, part: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { part.to_string() } else { format!("{}.{part}", self.prefix) }
    }

    pub fn has(&self, part: &str) -> bool {
        self.weights.has(&self.name(part))
    }

    pub fn tensor<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        self.weights.tensor(&self.name(part), shape, self.device)
    }

    /// A large weight, stored in the type of choice.
    pub fn stored<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let tensor = self.tensor(part, shape)?;
        Ok(match self.storage {
            Storage::F32 => tensor,
            Storage::F16 => tensor.cast(DType::F16),
        })
    }
}
