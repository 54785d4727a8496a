//! Small file helpers: every result is written to a temporary name and renamed.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Writes a whole file or nothing: to a temporary name beside it, then renamed.
///
/// # Errors
/// When the folder is missing, not writable, or the disk is full; names the file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = || format!("{}: cannot be written (is the disk full, or the folder read-only?)", path.display());
    std::fs::create_dir_all(dir).with_context(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(failed)?;
    file.write_all(bytes).with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    let kept = file.persist(path).map_err(|e| e.error).with_context(failed)?;
    // A temporary file is private; a result is as readable as any other file.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        kept.set_permissions(std::fs::Permissions::from_mode(0o644)).with_context(failed)?;
    }
    drop(kept);
    Ok(())
}

/// A picture as the bytes of a PNG file.
///
/// # Errors
/// When it cannot be encoded.
pub fn png(image: &image::RgbImage) -> Result<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).context("a picture cannot be encoded as PNG")?;
    Ok(bytes.into_inner())
}

/// Checks that a file can be written where it shall be, without leaving anything: what takes hours is not lost at its end.
///
/// # Errors
/// Names the file.
pub fn probe(path: &Path) -> Result<()> {
    let existing = path.ancestors().skip(1).find(|d| d.is_dir() || d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    let blocked = path.is_dir() || path.ancestors().skip(1).any(|d| d.exists() && !d.is_dir());
    let failed = || format!("{}: cannot be written; choose another place", path.display());
    ensure!(!blocked, failed());
    tempfile::tempfile_in(dir).with_context(failed)?;
    Ok(())
}

/// Reads a text file.
///
/// # Errors
/// Names the file.
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))
}

/// Reads a JSON file.
///
/// # Errors
/// Names the file, and the line where it is not JSON.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_str(&read_text(path)?).with_context(|| format!("{}: not valid JSON", path.display()))
}

/// Numbers in JSON that come back to the bit: as strings, since the reader of numbers may be off in the last place.
pub mod exact {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(values: &[f64], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(f64::to_string))
    }

    /// # Errors
    /// When an entry is not a number.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
        Vec::<String>::deserialize(from)?.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

/// A named f32 tensor on the host: (name, shape, values).
pub type Named = (String, Vec<usize>, Vec<f32>);

/// Writes f32 tensors as safetensors, with string metadata.
///
/// # Errors
/// As [`write()`].
pub fn write_tensors(path: &Path, tensors: &[Named], metadata: &[(&str, String)]) -> Result<()> {
    use safetensors::tensor::{Dtype, TensorView};
    let views = tensors
        .iter()
        .map(|(name, shape, values)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .with_context(|| format!("{}: tensors and shapes disagree", path.display()))?;
    let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    let bytes = safetensors::serialize(views, Some(metadata)).context("safetensors")?;
    write(path, &sorted_header(&bytes)?)
}

/// The library writes metadata in the order of a hash map; sorted, the same run writes the same file.
fn sorted_header(bytes: &[u8]) -> Result<Vec<u8>> {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).context("safetensors header")?;
    let mut text = header.to_string();
    // Tensors start at a multiple of 8.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    Ok([&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[8 + length..]].concat())
}
