//! The pictures of a run as they stand in its page: small JPEGs, encoded once each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::imageops::FilterType;

use super::view::Picture;
use crate::io;
use crate::train::run_folder::{GRID, GRIDS, SAMPLE, SAMPLED};

/// Grids in a page.
const MOST_GRIDS: usize = 40;
/// Pictures asked for by hand in a page, the newest.
const MOST_SAMPLES: usize = 12;
/// A picture is never wider.
const MOST_WIDTH: u32 = 640;
/// Pictures up to this width are shown magnified, where JPEG's blocks would be seen.
pub const SMALL: u32 = 320;

/// Pictures by their files.
#[derive(Default)]
pub struct PictureCache(BTreeMap<PathBuf, Encoded>);

struct Encoded {
    /// Of the file when it was read.
    modified: Option<SystemTime>,
    picture: Picture,
}

/// A picture's file and the number in its name.
struct Numbered {
    number: usize,
    path: PathBuf,
}

impl PictureCache {
    /// The grids of the evaluations, then what was asked for by hand.
    ///
    /// # Errors
    /// Names the picture that cannot be read.
    pub fn read(&mut self, dir: &Path) -> Result<Vec<Picture>> {
        let grids = chosen(numbered(&dir.join(GRIDS), GRID));
        let mut samples = numbered(&dir.join(SAMPLED), SAMPLE);
        samples.drain(..samples.len().saturating_sub(MOST_SAMPLES));
        let kept: Vec<&PathBuf> = grids.iter().chain(&samples).map(|n| &n.path).collect();
        // Those of other runs stay.
        self.0.retain(|path, _| !path.starts_with(dir) || kept.contains(&path));
        let mut pictures = Vec::new();
        for Numbered { number, path } in &grids {
            let label =
                if *number == 0 { "before training".into() } else { format!("epoch {number}") };
            pictures.push(Picture { label, epoch: Some(*number), ..self.encoded(path)? });
        }
        for Numbered { number, path } in &samples {
            let label = format!("after update {number}");
            pictures.push(Picture { label, epoch: None, ..self.encoded(path)? });
        }
        Ok(pictures)
    }

    /// A file's picture without its label.
    fn encoded(&mut self, path: &Path) -> Result<Picture> {
        let modified = std::fs::metadata(path).and_then(|m| m.modified()).ok();
        if let Some(known) = self.0.get(path).filter(|k| k.modified == modified) {
            return Ok(known.picture.clone());
        }
        let picture = encode(path)?;
        let known = Encoded { modified, picture: picture.clone() };
        self.0.insert(path.to_path_buf(), known);
        Ok(picture)
    }
}

/// The PNG files `PREFIX123.png` of a folder, in order of their numbers.
fn numbered(dir: &Path, prefix: &str) -> Vec<Numbered> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let file = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let number = name.to_str()?.strip_prefix(prefix)?.strip_suffix(".png")?.parse().ok()?;
        Some(Numbered { number, path: entry.path() })
    };
    let mut files: Vec<Numbered> = entries.filter_map(file).collect();
    files.sort_by_key(|f| f.number);
    files
}

/// Every n-th grid and the last, n a power of two: most of a page's grids are in the next page too,
/// where they need not be encoded again.
fn chosen(files: Vec<Numbered>) -> Vec<Numbered> {
    let last = files.len().saturating_sub(1);
    let mut apart = 1;
    while files.len().div_ceil(apart) + 1 > MOST_GRIDS {
        apart *= 2;
    }
    let keep = |(i, file): (usize, Numbered)| (i % apart == 0 || i == last).then_some(file);
    files.into_iter().enumerate().filter_map(keep).collect()
}

fn encode(path: &Path) -> Result<Picture> {
    let failed = || format!("{}: the picture cannot be read", path.display());
    let bytes = std::fs::read(path).with_context(failed)?;
    let mut image = image::load_from_memory(&bytes).with_context(failed)?.into_rgb8();
    if image.width() > MOST_WIDTH {
        let (width, height) = (u64::from(image.width()), u64::from(image.height()));
        let height = (height * u64::from(MOST_WIDTH) / width).max(1) as u32;
        image = image::imageops::resize(&image, MOST_WIDTH, height, FilterType::CatmullRom);
    }
    let quality = if image.width() <= SMALL { 95 } else { 85 };
    let jpeg = io::jpeg(&image, quality).with_context(failed)?;
    let data_uri = format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg));
    let (width, height) = image.dimensions();
    Ok(Picture { data_uri, width, height, ..Picture::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<usize> {
        let file = |number| Numbered { number, path: PathBuf::new() };
        chosen((0..count).map(file).collect()).iter().map(|f| f.number).collect()
    }

    #[test]
    fn few_grids_are_all_there_and_of_many_the_first_and_the_last() {
        assert!(numbers(0).is_empty());
        assert_eq!(numbers(1), [0]);
        assert_eq!(numbers(39), (0..39).collect::<Vec<_>>());
        for count in [40, 41, 100, 1000, 5001] {
            let found = numbers(count);
            assert!((20..=MOST_GRIDS).contains(&found.len()), "{count}: {}", found.len());
            assert_eq!((found[0], found[found.len() - 1]), (0, count - 1));
        }
    }
}
