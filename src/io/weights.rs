//! Reading safetensors: tensors are mapped into memory and read when asked for; one file, a sharded
//! set with its index, or an fp16 variant; f32, f16 and bf16.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::tensors::HostTensor;

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// The tensors of a file, or of a component's files, mapped into memory and read when asked for.
pub struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
    source: PathBuf,
    /// How often tensors were read, for tests.
    #[cfg(test)]
    pub reads: std::sync::atomic::AtomicUsize,
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
                return shards(dir, &index);
            }
        }
    }
    bail!(
        "{}: no weights found; expected diffusion_pytorch_model.safetensors or model.safetensors, \
         alone, as .fp16 variant or with an index (.bin files: convert them with diffusers)",
        dir.display()
    )
}

/// The files that an index names, all of which lie beside it.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json: Value = super::read_json(index)?;
    let map = json["weight_map"].as_object().filter(|m| !m.is_empty());
    let map = map.ok_or_else(|| anyhow!("{}: field weight_map is missing", index.display()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().unwrap_or_default();
        let plain = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        ensure!(
            !name.is_empty() && plain,
            "{}: weight_map of {tensor} is {file}, not the name of a file beside the index",
            index.display()
        );
        names.push(dir.join(name));
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
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

    fn open(paths: &[PathBuf], source: &Path) -> Result<Self> {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        for (i, path) in paths.iter().enumerate() {
            let map = map(path)?;
            let tensors = SafeTensors::deserialize(&map).map_err(|e| {
                let path = path.display();
                anyhow!("{path}: not a valid safetensors file ({e}); download or save it again")
            })?;
            for (name, view) in tensors.tensors() {
                let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
                let range = start..start + view.data().len();
                let shape = view.shape().to_vec();
                entries.insert(name, Entry { file: i, dtype: view.dtype(), shape, range });
            }
            files.push((path.clone(), map));
        }
        Ok(Self {
            files,
            entries,
            source: source.to_path_buf(),
            #[cfg(test)]
            reads: Default::default(),
        })
    }

    /// The folder or file that the tensors came from.
    pub fn source(&self) -> &Path {
        &self.source
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

    /// An entry of the first file's metadata, where there is one.
    ///
    /// # Errors
    /// When the header cannot be read.
    pub fn metadata(&self, key: &str) -> Result<Option<String>> {
        let (path, map) = &self.files[0];
        let (_, header) = SafeTensors::read_metadata(map)
            .map_err(|e| anyhow!("{}: not a valid safetensors file ({e})", path.display()))?;
        Ok(header.metadata().as_ref().and_then(|m| m.get(key)).cloned())
    }

    /// An entry of the first file's metadata that has to be there.
    ///
    /// # Errors
    /// When the file has no such entry.
    pub fn required_metadata(&self, key: &str) -> Result<String> {
        let found = self.metadata(key)?;
        found.ok_or_else(|| {
            anyhow!("{}: its metadata has no entry {key}", self.files[0].0.display())
        })
    }

    /// One tensor in f32; refuses values that are not finite.
    ///
    /// # Errors
    /// When it is missing, of another type, or holds a value that is not finite.
    pub fn f32(&self, name: &str) -> Result<HostTensor> {
        let tensor = self.raw(name)?;
        if let Some(i) = tensor.values.iter().position(|v| !v.is_finite()) {
            let path = self.files[self.entries[name].file].0.display();
            let value = tensor.values[i];
            bail!("{path}: tensor {name} holds {value} at element {i}; the file is damaged");
        }
        Ok(tensor)
    }

    /// One tensor in f32, converted from f16 and bf16, whatever its values.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn raw(&self, name: &str) -> Result<HostTensor> {
        let e = self.entry(name)?;
        Ok(HostTensor::new(name, e.shape.clone(), self.values(name, e, e.range.clone())?))
    }

    /// Row `i` along the first dimension of a tensor whose rows have a known shape, in f32,
    /// without reading the rest.
    ///
    /// # Errors
    /// When the tensor is missing, of another type or shape, or the row is not finite.
    pub fn row(&self, name: &str, i: usize, shape: &[usize]) -> Result<Vec<f32>> {
        self.rows(name, i..i + 1, shape)
    }

    /// Rows along the first dimension, one after the other; see [`Self::row`].
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn rows(&self, name: &str, rows: Range<usize>, shape: &[usize]) -> Result<Vec<f32>> {
        let e = self.entry(name)?;
        ensure!(
            e.shape.first().is_some_and(|&n| rows.end <= n) && &e.shape[1..] == shape,
            "{}: tensor {name} has shape {:?}; at least {} rows of {shape:?} are expected",
            self.source.display(),
            e.shape,
            rows.end
        );
        let bytes = e.range.len() / e.shape[0];
        let range = e.range.start + rows.start * bytes..e.range.start + rows.end * bytes;
        let values = self.values(name, e, range)?;
        ensure!(
            values.iter().all(|v| v.is_finite()),
            "{}: tensor {name} holds a value that is not finite in rows {rows:?}; the file is \
             damaged",
            self.source.display()
        );
        Ok(values)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .ok_or_else(|| anyhow!("{}: tensor {name} is missing", self.source.display()))
    }

    fn values(&self, name: &str, e: &Entry, range: Range<usize>) -> Result<Vec<f32>> {
        #[cfg(test)]
        self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (path, map) = &self.files[e.file];
        let bytes = &map[range.clone()];
        let half = |b: &[u8]| [b[0], b[1]];
        let values = match e.dtype {
            Dtype::F32 => {
                let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                bytes.chunks_exact(4).map(word).collect()
            }
            Dtype::F16 => {
                bytes.chunks_exact(2).map(|b| f16::from_le_bytes(half(b)).to_f32()).collect()
            }
            Dtype::BF16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(half(b)).to_f32()).collect()
            }
            other => bail!(
                "{}: tensor {name} has type {other:?}; F32, F16 and BF16 are supported",
                path.display()
            ),
        };
        // A mapped file counts as this process's memory once it is read: a large model would
        // count twice.
        #[cfg(target_os = "linux")]
        if range.len() > 1 << 20 {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and backed by its file; pages that are dropped are read
            // again when needed.
            let _ = unsafe { map.unchecked_advise_range(advice, range.start, range.len()) };
        }
        Ok(values)
    }
}

fn map(path: &Path) -> Result<Mmap> {
    // Opening a pipe would wait for its other end.
    ensure!(!path.exists() || path.is_file(), "{}: is not a regular file", path.display());
    let opened = std::fs::File::open(path);
    let file = opened.with_context(|| format!("{}: cannot be opened", path.display()))?;
    // SAFETY: the map is read-only; like every program that maps weights we rely on nobody
    // truncating them.
    let map = unsafe { Mmap::map(&file) };
    map.with_context(|| format!("{}: cannot be read", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_only_files_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        for name in ["../a.safetensors", "/a.safetensors", "", "b/../../a.safetensors"] {
            let text = serde_json::json!({ "weight_map": { "x": name } }).to_string();
            std::fs::write(&index, text).unwrap();
            let error = Weights::open_dir(dir.path()).err().unwrap().to_string();
            assert!(error.contains("weight_map of x") && error.contains("index.json"), "{error}");
        }
    }
}
