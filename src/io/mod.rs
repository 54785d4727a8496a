//! Files: every result is written to a temporary name and renamed; every error names the file.

pub mod checkpoint;
pub mod imports;
pub mod layout;
pub mod mapped;
pub mod rewrite;
pub mod shards;
pub mod tensors;
pub mod weights;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;

/// Writes a whole file or nothing: to a temporary name beside it, then renamed.
///
/// # Errors
/// When the folder is missing, not writable, or the disk is full; names the file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Writes a whole file or nothing, piece by piece.
///
/// # Errors
/// As [`write()`].
pub fn write_with(path: &Path, body: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = || {
        let path = path.display();
        format!("{path}: cannot be written (is the disk full, or the folder read-only?)")
    };
    std::fs::create_dir_all(dir).with_context(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(failed)?;
    body(file.as_file_mut()).with_context(failed)?;
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
    image
        .write_to(&mut bytes, image::ImageFormat::Png)
        .context("a picture cannot be encoded as PNG")?;
    Ok(bytes.into_inner())
}

/// A picture as the bytes of a JPEG file of a quality of 1 to 100.
///
/// # Errors
/// When it has no pixels, or is larger than JPEG allows.
pub fn jpeg(image: &image::RgbImage, quality: u8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = image.dimensions();
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .encode(image.as_raw(), width, height, ExtendedColorType::Rgb8)
        .context("an image cannot be written as JPEG")?;
    Ok(bytes)
}

/// Checks that a file can be written where it shall be, without leaving anything: what takes hours
/// is not lost at its end.
///
/// # Errors
/// Names the file.
pub fn probe(path: &Path) -> Result<()> {
    let above = || path.ancestors().skip(1);
    let existing = above().find(|d| d.is_dir() || d.as_os_str().is_empty());
    let existing = existing.filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let blocked = path.is_dir() || above().any(|d| d.exists() && !d.is_dir());
    let failed = || format!("{}: cannot be written; choose another place", path.display());
    ensure!(!blocked, failed());
    tempfile::tempfile_in(existing).with_context(failed)?;
    Ok(())
}

/// Where what comes with the program may lie, `models/..`, when it is not below the working
/// directory: in the program's own folder and the three above, as cargo and the archives put it.
pub fn beside_program(path: &Path) -> impl Iterator<Item = PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let folders: Vec<PathBuf> = program.ancestors().skip(1).take(4).map(|d| d.join(path)).collect();
    folders.into_iter()
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
    // A pipe in a model's folder would be waited for without end.
    ensure!(!path.exists() || path.is_file(), "{}: is not a regular file", path.display());
    serde_json::from_str(&read_text(path)?)
        .with_context(|| format!("{}: not valid JSON", path.display()))
}

/// Numbers in JSON as strings, as checkpoints have held them since their second version.
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
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}
