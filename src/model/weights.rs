//! Reading safetensors: one file, a sharded set with its index, or an fp16 variant; f32, f16 and bf16.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::quantization::{QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

/// The type that frozen weights are stored in; computation is f32. 8 and 4 bits hold the linear layers' matrices, with
/// one scale for each block of [`QUANTISED_BLOCK`] values; what they leave out is stored as f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    F32,
    F16,
    Q8,
    Q4,
}

/// Weights that share a scale where they are quantised.
pub const QUANTISED_BLOCK: usize = 32;

impl Storage {
    /// The type of weights that are not quantised.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 | Self::Q8 | Self::Q4 => DType::F16,
        }
    }

    /// Symmetric quantisation with f32 scales, for linear layers.
    pub fn scheme(self) -> Option<QuantScheme> {
        let value = match self {
            Self::F32 | Self::F16 => return None,
            Self::Q8 => QuantValue::Q8S,
            Self::Q4 => QuantValue::Q4S,
        };
        Some(QuantScheme::default().with_value(value).per_block([QUANTISED_BLOCK as u8], ScaleDtype::F32))
    }
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

    /// SHA-256 over all files, for checkpoints; of files past 4 GiB one MiB in 64, and the length.
    pub fn add_to_hash(&self, hasher: &mut sha2::Sha256) {
        use sha2::Digest;
        const MIB: usize = 1 << 20;
        for (_, map) in &self.files {
            if map.len() <= 4096 * MIB {
                hasher.update(&map[..]);
                continue;
            }
            hasher.update((map.len() as u64).to_le_bytes());
            for start in (0..map.len()).step_by(64 * MIB) {
                hasher.update(&map[start..(start + MIB).min(map.len())]);
            }
        }
    }

    /// A string of the first file's metadata.
    ///
    /// # Errors
    /// When the file has no such entry.
    pub fn metadata(&self, key: &str) -> Result<String> {
        let (path, map) = &self.files[0];
        let (_, header) = SafeTensors::read_metadata(map)
            .map_err(|e| anyhow!("{}: not a valid safetensors file ({e})", path.display()))?;
        let found = header.metadata().as_ref().and_then(|m| m.get(key)).cloned();
        found.ok_or_else(|| anyhow!("{}: its metadata has no entry {key}", path.display()))
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
        let e = self.entry(name)?;
        Ok((self.values(name, e, e.range.clone())?, e.shape.clone()))
    }

    /// Row `i` along the first dimension of a tensor whose rows have a known shape, as f32, without reading the rest.
    ///
    /// # Errors
    /// When the tensor is missing, of another type or shape, or the row holds a value that is not finite.
    pub fn row(&self, name: &str, i: usize, shape: &[usize]) -> Result<Vec<f32>> {
        let e = self.entry(name)?;
        ensure!(
            e.shape.first().is_some_and(|&n| i < n) && &e.shape[1..] == shape,
            "{}: tensor {name} has shape {:?}; rows of {shape:?} are expected, more than {i} of them",
            self.dir.display(),
            e.shape
        );
        let bytes = e.range.len() / e.shape[0];
        let values = self.values(name, e, e.range.start + i * bytes..e.range.start + (i + 1) * bytes)?;
        ensure!(
            values.iter().all(|v| v.is_finite()),
            "{}: tensor {name} holds a value that is not finite in row {i}; the file is damaged",
            self.dir.display()
        );
        Ok(values)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| anyhow!("{}: tensor {name} is missing", self.dir.display()))
    }

    fn values(&self, name: &str, e: &Entry, range: std::ops::Range<usize>) -> Result<Vec<f32>> {
        let path = self.files[e.file].0.display();
        let bytes = &self.files[e.file].1[range.clone()];
        let values = match e.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => bail!("{path}: tensor {name} has type {other:?}; F32, F16 and BF16 are supported"),
        };
        // A mapped file counts as this process's memory once it is read: a large model would count twice.
        #[cfg(target_os = "linux")]
        if range.len() > 1 << 20 {
            // SAFETY: the map is read-only and backed by its file; pages that are dropped are read again when needed.
            let advice = memmap2::UncheckedAdvice::DontNeed;
            let _ = unsafe { self.files[e.file].1.unchecked_advise_range(advice, range.start, range.len()) };
        }
        Ok(values)
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
        let dtype = self.storage.dtype();
        Ok(if dtype == DType::F32 { tensor } else { tensor.cast(dtype) })
    }
}
