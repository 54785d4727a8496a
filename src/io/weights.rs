//! Reading weights: safetensors are mapped into memory and read when asked for, as one file, a
//! sharded set with its index, or an fp16 variant; PyTorch's checkpoints tensor by tensor. f32,
//! f16, bf16 and f8 (e4m3).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::checkpoint;
use super::mapped::map;
use super::shards;
use super::tensors::HostTensor;

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    place: Place,
    /// Its bytes there.
    pub(super) range: Range<usize>,
    /// Whether its rows are read as columns.
    pub(super) transposed: bool,
    /// Whether the second half of its rows is read first.
    pub(super) swapped: bool,
}

impl Entry {
    fn new(dtype: Dtype, shape: Vec<usize>, place: Place, range: Range<usize>) -> Self {
        Self { dtype, shape, place, range, transposed: false, swapped: false }
    }

    /// Whether its values are read in the order in which they lie.
    pub(super) fn plain(&self) -> bool {
        !self.transposed && !self.swapped
    }
}

/// Where a tensor lies.
#[derive(Clone)]
pub(super) enum Place {
    /// In one of the mapped files.
    Mapped(usize),
    /// In a checkpoint, which is read a whole tensor at a time.
    Checkpoint(pytorch_reader::Tensor),
}

/// The tensors of a file, or of a component's files, mapped into memory and read when asked for. A
/// clone is another list of names over the same files.
#[derive(Clone)]
pub struct Weights {
    files: Arc<Vec<(PathBuf, Mmap)>>,
    pub(super) entries: BTreeMap<String, Entry>,
    source: PathBuf,
    /// How often tensors were read, for tests.
    #[cfg(test)]
    pub reads: Arc<std::sync::atomic::AtomicUsize>,
}

/// The entries whose names begin with a prefix, without it.
pub(super) fn below(prefix: &str, entries: &BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let short = |(name, entry): (&String, &Entry)| {
        name.strip_prefix(prefix).map(|short| (short.to_string(), entry.clone()))
    };
    entries.iter().filter_map(short).collect()
}

/// The types of weights.
const SUPPORTED: &str = "F64, F32, F16, BF16 and F8_E4M3";

/// Whether a type is of whole numbers: token numbers and masks, and no weight.
fn counts(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I64 | Dtype::I32 | Dtype::U8 | Dtype::BOOL)
}

/// The values of numbers of `N` bytes each.
fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    // As many as a core reads at a time.
    const PART: usize = 1 << 16;
    let numbers = bytes.as_chunks::<N>().0;
    let mut values = vec![0.0; numbers.len()];
    let parts = values.par_chunks_mut(PART).zip(numbers.par_chunks(PART));
    parts.for_each(|(values, numbers)| {
        values.iter_mut().zip(numbers).for_each(|(to, from)| *to = value(*from));
    });
    values
}

/// A number of 8 bits, 4 of them its exponent and 3 its mantissa (`float8_e4m3fn`).
pub(super) fn e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    sign * match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

impl Weights {
    /// Opens the weights of a component folder (`unet`, `vae`, `text_encoder`).
    ///
    /// # Errors
    /// When no weight file is there, or one is truncated or not safetensors.
    pub fn open_dir(dir: &Path) -> Result<Self> {
        Self::open(&shards::weight_files(dir)?, dir)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When the file is missing, truncated or not safetensors.
    pub fn open_file(file: &Path) -> Result<Self> {
        Self::open(&[file.to_path_buf()], file)
    }

    /// Opens a file of weights of either kind: PyTorch's checkpoints end in .pt, .pth, .bin or
    /// .ckpt. The names begin below `state_dict`, where the file has one.
    ///
    /// # Errors
    /// As [`Self::open_file`] and [`checkpoint::open`].
    pub fn open_any(file: &Path) -> Result<Self> {
        if !checkpoint::is_one(file) {
            return Self::open_file(file);
        }
        let mut entries = BTreeMap::new();
        for tensor in checkpoint::open(file)? {
            let Some(dtype) = checkpoint::dtype(tensor.dtype()) else { continue };
            let name = tensor.name.clone();
            let (shape, range) = (tensor.shape().to_vec(), 0..tensor.byte_len());
            entries.insert(name, Entry::new(dtype, shape, Place::Checkpoint(tensor), range));
        }
        // An optimizer's state may lie beside it.
        if entries.keys().any(|name| name.starts_with("state_dict.")) {
            entries = below("state_dict.", &entries);
        }
        // Training on several devices puts a prefix before every name.
        if entries.keys().all(|name| name.starts_with("module.")) {
            entries = below("module.", &entries);
        }
        Ok(Self {
            files: Arc::default(),
            entries,
            source: file.to_path_buf(),
            #[cfg(test)]
            reads: Default::default(),
        })
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
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                entries.insert(name, Entry::new(dtype, shape, Place::Mapped(i), range));
            }
            files.push((path.clone(), map));
        }
        Ok(Self {
            files: Arc::new(files),
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

    /// Values of the tensors whose names are wanted.
    pub fn elements(&self, wanted: impl Fn(&str) -> bool) -> usize {
        let named = self.entries.iter().filter(|(name, _)| wanted(name));
        named.map(|(_, e)| e.shape.iter().product::<usize>()).sum()
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
        for (_, map) in self.files.iter() {
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
        Ok(self.all_metadata()?.remove(key))
    }

    /// All of the first file's metadata.
    ///
    /// # Errors
    /// When the header cannot be read.
    pub fn all_metadata(&self) -> Result<BTreeMap<String, String>> {
        let Some((path, map)) = self.files.first() else { return Ok(BTreeMap::new()) };
        let (_, header) = SafeTensors::read_metadata(map)
            .map_err(|e| anyhow!("{}: not a valid safetensors file ({e})", path.display()))?;
        Ok(header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    /// An entry of the first file's metadata that has to be there.
    ///
    /// # Errors
    /// When the file has no such entry.
    pub fn required_metadata(&self, key: &str) -> Result<String> {
        let found = self.metadata(key)?;
        found.ok_or_else(|| anyhow!("{}: its metadata has no entry {key}", self.source.display()))
    }

    /// The bytes of a tensor of bytes.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let e = self.entry(name)?;
        ensure!(e.dtype == Dtype::U8, "{}: tensor {name} is not bytes", self.source.display());
        Ok(self.stored(e, &e.range)?.into_owned())
    }

    /// One tensor in f32; refuses values that are not finite.
    ///
    /// # Errors
    /// When it is missing, of another type, or holds a value that is not finite.
    pub fn f32(&self, name: &str) -> Result<HostTensor> {
        let dtype = self.entry(name)?.dtype;
        ensure!(
            !counts(dtype),
            "{}: tensor {name} has type {dtype:?}; {SUPPORTED} are supported",
            self.path_of(self.entry(name)?).display()
        );
        let tensor = self.raw(name)?;
        if !tensor.values.par_iter().all(|v| v.is_finite())
            && let Some(i) = tensor.values.iter().position(|v| !v.is_finite())
        {
            let path = self.path_of(&self.entries[name]).display();
            let value = tensor.values[i];
            bail!("{path}: tensor {name} holds {value} at element {i}; the file is damaged");
        }
        Ok(tensor)
    }

    /// One tensor in f32, converted from f16, bf16 and whole numbers, whatever its values.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn raw(&self, name: &str) -> Result<HostTensor> {
        let e = self.entry(name)?;
        let mut values = self.values(name, e, e.range.clone())?;
        if e.transposed {
            let [rows, columns] = [e.shape[0], e.shape[1]];
            let at = |i: usize| values[(i % columns) * rows + i / columns];
            values = (0..values.len()).map(at).collect();
        }
        if e.swapped {
            let half = values.len() / 2;
            values.rotate_left(half);
        }
        Ok(HostTensor::new(name, e.shape.clone(), values))
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
            e.shape.first().is_some_and(|&n| rows.end <= n) && &e.shape[1..] == shape && e.plain(),
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

    /// The file that a tensor lies in.
    fn path_of(&self, e: &Entry) -> &Path {
        match e.place {
            Place::Mapped(file) => &self.files[file].0,
            Place::Checkpoint(_) => &self.source,
        }
    }

    /// A part of a tensor as it is stored: borrowed where the file is mapped.
    pub(super) fn stored(&self, e: &Entry, range: &Range<usize>) -> Result<Cow<'_, [u8]>> {
        Ok(match &e.place {
            Place::Mapped(file) => Cow::Borrowed(&self.files[*file].1[range.clone()]),
            Place::Checkpoint(tensor) => {
                let path = self.source.display();
                let read = tensor.read().with_context(|| format!("{path}: cannot be read"))?;
                let part = range.len() < read.len();
                Cow::Owned(if part { read[range.clone()].to_vec() } else { read })
            }
        })
    }

    fn values(&self, name: &str, e: &Entry, range: Range<usize>) -> Result<Vec<f32>> {
        #[cfg(test)]
        self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let bytes = self.stored(e, &range)?;
        let values = match e.dtype {
            Dtype::F32 => each(&bytes, f32::from_le_bytes),
            Dtype::F16 => each(&bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => each(&bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F8_E4M3 => each(&bytes, |[b]| e4m3(b)),
            Dtype::I64 => each(&bytes, |b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => each(&bytes, |b| i32::from_le_bytes(b) as f32),
            Dtype::U8 | Dtype::BOOL => each(&bytes, |[b]| f32::from(b)),
            other => bail!(
                "{}: tensor {name} has type {other:?}; {SUPPORTED} are supported",
                self.path_of(e).display()
            ),
        };
        self.release(e, &range);
        Ok(values)
    }

    /// A mapped file counts as this process's memory once it is read: a large model would count
    /// twice.
    pub(super) fn release(&self, e: &Entry, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Place::Mapped(file) = e.place
            && range.len() > 1 << 20
        {
            let map = &self.files[file].1;
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and backed by its file; pages that are dropped are read
            // again when needed.
            let _ = unsafe { map.unchecked_advise_range(advice, range.start, range.len()) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (e, range);
    }
}
