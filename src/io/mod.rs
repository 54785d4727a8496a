//! Files: every result is written to a temporary name and renamed; every error names the file.

pub mod checkpoint;
mod columns;
#[doc(hidden)]
pub mod disk;
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

/// What the names of files and folders begin with until they are whole.
pub const PARTIAL: &str = ".partial-";

/// Removes what a program that was killed was writing in a folder.
pub fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PARTIAL)) {
            let path = entry.path();
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        }
    }
}

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
    let dir = disk::parent(path);
    let failed = || {
        let path = path.display();
        format!("{path}: cannot be written (is the disk full, or the folder read-only?)")
    };
    disk::make_dir(dir).with_context(failed)?;
    let mut builder = tempfile::Builder::new();
    let mut file = builder.prefix(PARTIAL).tempfile_in(dir).with_context(failed)?;
    body(file.as_file_mut()).with_context(failed)?;
    // A temporary file is private; a result is as readable as any other file.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let readable = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(readable).with_context(failed)?;
    }
    disk::sync_file(file.path(), file.as_file()).with_context(failed)?;
    let temporary = file.path().to_path_buf();
    file.persist(path).map_err(|e| e.error).with_context(failed)?;
    disk::renamed(&temporary, path).with_context(failed)
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

/// Writes a whole folder or nothing: `body` fills one of another name beside it, then it is
/// renamed. What is there already goes when the new one is whole.
///
/// # Errors
/// When it cannot be written; names the folder. What `body` fails with.
pub fn write_dir(path: &Path, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = disk::parent(path);
    let failed = || format!("{}: cannot be written", path.display());
    disk::make_dir(dir).with_context(failed)?;
    let temporary =
        tempfile::Builder::new().prefix(PARTIAL).tempdir_in(dir).with_context(failed)?;
    disk::made_dir(temporary.path());
    body(temporary.path())?;
    if path.exists() {
        remove_dir(path)?;
    }
    disk::rename(temporary.path(), path).with_context(failed)?;
    // It is not there to be removed any more.
    let _ = temporary.keep();
    Ok(())
}

/// Removes a folder: from one moment to the next it is not there any more. What is left of it when
/// that is cut short is swept.
///
/// # Errors
/// Names the folder.
pub fn remove_dir(path: &Path) -> Result<()> {
    let aside = || {
        let aside = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(disk::parent(path))?;
        disk::made_dir(aside.path());
        disk::rename(path, &aside.path().join("old"))?;
        disk::remove_dir(&aside.keep())
    };
    aside().with_context(|| format!("{}: cannot be removed", path.display()))
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

/// Whether two paths are one file that is there.
pub fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
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
