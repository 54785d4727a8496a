//! TensorBoard's event files: numbers and pictures that it draws over the steps of a run.
//!
//! A file is a row of records (TFRecord, as TensorFlow's `record_writer.cc` describes it):
//!
//! ```text
//! u64  length of the data, little-endian
//! u32  masked CRC-32C of those eight bytes
//! ...  data
//! u32  masked CRC-32C of the data
//! ```
//!
//! The data is one message in protobuf's wire format. The fields that are written, by the numbers
//! that TensorBoard's `event.proto` and `summary.proto` give them:
//!
//! ```text
//! Event    1 wall_time: double   2 step: int64   3 file_version: string   5 summary: Summary
//! Summary  1 value: Value
//! Value    1 tag: string         2 simple_value: float                    4 image: Image
//! Image    1 height: int32       2 width: int32  3 colorspace: int32      4 the file's bytes
//! ```
//!
//! The first record of a file holds its version, every other one a single value. TensorBoard adds
//! by itself the metadata that says which of its pages shows a tag.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use image::RgbImage;

use crate::io;

/// TensorBoard reads the files whose name holds "tfevents", in the order of their names.
const PREFIX: &str = "events.out.tfevents.";
/// Tells the files written here from those of other programs.
const SUFFIX: &str = ".pcpo-wgpu";
/// The format's version, as the first record states it.
const VERSION: &str = "brain.Event:2";
/// `Image.colorspace` of three channels.
const RGB: u64 = 3;

/// An event file that is being written.
///
/// Records may wait in memory: call [`flush`](Self::flush) where TensorBoard shall see them, and
/// before the file is dropped, which would pass over an error. A file that ends within a record is
/// read up to there. The steps of a tag have to rise: a step that does not is taken for a restart,
/// and TensorBoard drops the points of that tag from there on.
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventFile {
    /// Starts `events.out.tfevents.SECONDS.pcpo-wgpu` in a folder, which is made if it is missing.
    ///
    /// Earlier files of that name, whatever their seconds, are removed: a resumed run writes all
    /// of its records again. Those of other programs stay.
    ///
    /// # Errors
    /// When the folder cannot be read or written, or an earlier file cannot be removed; names it.
    pub fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("{}: cannot be made", dir.display()))?;
        let earlier = remove_earlier(dir)?;
        // A TensorBoard that is open goes on to a later name; the same one again it would take for
        // the file that it has read. (With `--load_fast false` it has to be started anew.)
        let seconds = earlier.map_or(0, |s| s.saturating_add(1)).max(now() as u64);
        let path = dir.join(format!("{PREFIX}{seconds:010}{SUFFIX}"));
        let file = File::create(&path).with_context(|| cannot_be_written(&path))?;
        let mut events = Self { path, file: BufWriter::new(file) };
        events.record(&version_event(now()))?;
        events.flush()?;
        Ok(events)
    }

    /// Writes a number, rounded to the f32 that the format holds.
    ///
    /// A number that is not finite, or is not as f32, is left out: the curve has no point there.
    ///
    /// # Errors
    /// When the disk is full; names the file.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<()> {
        let value = value as f32;
        if !value.is_finite() {
            return Ok(());
        }
        self.record(&summary_event(now(), step, &scalar_value(tag, value)))
    }

    /// Writes a picture, as PNG.
    ///
    /// # Errors
    /// When it cannot be encoded or the disk is full; names the file.
    pub fn picture(&mut self, tag: &str, step: u64, image: &RgbImage) -> Result<()> {
        let png = io::png(image).with_context(|| cannot_be_written(&self.path))?;
        let value = image_value(tag, image.dimensions(), &png);
        self.record(&summary_event(now(), step, &value))
    }

    /// Hands to the system what waits in memory.
    ///
    /// # Errors
    /// When the disk is full; names the file.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().with_context(|| cannot_be_written(&self.path))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&framed(data)).with_context(|| cannot_be_written(&self.path))
    }
}

/// Removes the event files of earlier runs of this program; returns the latest one's seconds.
fn remove_earlier(dir: &Path) -> Result<Option<u64>> {
    let unread = || format!("{}: cannot be read", dir.display());
    let mut latest = None;
    for entry in std::fs::read_dir(dir).with_context(unread)? {
        let entry = entry.with_context(unread)?;
        let Some(seconds) = entry.file_name().to_str().and_then(seconds_of) else { continue };
        let path = entry.path();
        std::fs::remove_file(&path).with_context(|| {
            format!("{}: cannot be removed (does a program hold it open?)", path.display())
        })?;
        latest = latest.max(Some(seconds));
    }
    Ok(latest)
}

/// The seconds in a name that [`EventFile::create`] gives, and None of any other.
fn seconds_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()
}

/// Seconds since 1970, by the clock.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn cannot_be_written(path: &Path) -> String {
    format!("{}: cannot be written (is the disk full, or the folder read-only?)", path.display())
}

/// A record: the data between its length and the checksums.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let checksum = |bytes| masked_crc(bytes).to_le_bytes();
    [&length[..], &checksum(&length), data, &checksum(data)].concat()
}

/// The CRC-32C as TFRecord stores it, `rotate_right(crc, 15) + 0xa282ead8`, so that checksums of
/// data that itself holds checksums stay different.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The `Event` that opens a file.
fn version_event(wall_time: f64) -> Vec<u8> {
    Message::default().double(1, wall_time).bytes(3, VERSION.as_bytes()).0
}

/// An `Event` with one value.
fn summary_event(wall_time: f64, step: u64, value: &[u8]) -> Vec<u8> {
    let summary = Message::default().bytes(1, value).0;
    Message::default().double(1, wall_time).integer(2, step).bytes(5, &summary).0
}

/// A `Value` of the page "Scalars".
fn scalar_value(tag: &str, value: f32) -> Vec<u8> {
    Message::default().bytes(1, tag.as_bytes()).float(2, value).0
}

/// A `Value` of the page "Images", from (width, height) and the bytes of a PNG file.
fn image_value(tag: &str, (width, height): (u32, u32), png: &[u8]) -> Vec<u8> {
    let size = Message::default().integer(1, height.into()).integer(2, width.into());
    let image = size.integer(3, RGB).bytes(4, png).0;
    Message::default().bytes(1, tag.as_bytes()).bytes(4, &image).0
}

/// A message in protobuf's wire format: before each field stands `number * 8 + wire type`.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// int32 and int64 that are not negative: wire type 0.
    fn integer(mut self, number: u64, value: u64) -> Self {
        self.varint(number << 3);
        self.varint(value);
        self
    }

    /// double: wire type 1.
    fn double(mut self, number: u64, value: f64) -> Self {
        self.varint(number << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// string, bytes and messages: wire type 2.
    fn bytes(mut self, number: u64, value: &[u8]) -> Self {
        self.varint(number << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// float: wire type 5.
    fn float(mut self, number: u64, value: f32) -> Self {
        self.varint(number << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Seven bits a byte, the lowest first; the top bit says that more follow.
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the records of a file hold, with every checksum verified.
    fn read_back(path: &Path) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (length, after) = rest.split_first_chunk::<8>().unwrap();
            let (crc, after) = after.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*crc), masked_crc(length), "the length's checksum");
            let (data, after) = after.split_at(u64::from_le_bytes(*length) as usize);
            let (crc, after) = after.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*crc), masked_crc(data), "the data's checksum");
            records.push(data.to_vec());
            rest = after;
        }
        records
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The CRC-32C of "123456789" is e3069283 (the check value of the catalogues), that of 32 zeros
    /// 8a9136aa (RFC 3720, B.4); masked by TensorBoard 2.21's `masked_crc32c`.
    #[test]
    fn checksums_are_masked_as_tensorboard_does() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x0fd7_fffa);
    }

    /// Against what TensorBoard 2.21 writes of the same events: its `RecordWriter` on
    /// `event_pb2.Event(wall_time=1.5, ..).SerializeToString()`.
    #[test]
    fn records_are_those_of_tensorboard_to_the_byte() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let version = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e457665\
                       6e743a322a28646c";
        assert_eq!(hex(&framed(&version_event(1.5))), version);
        let scalar = "1a00000000000000129bd82d09000000000000f83f10ac022a0c0a0a0a03612f\
                      62150000803ef9cde7ed";
        let value = scalar_value("a/b", 0.25);
        assert_eq!(hex(&framed(&summary_event(1.5, 300, &value))), scalar);
        let image = "2300000000000000b09f774309000000000000f83f10ac022a150a130a03612f\
                     62220c080210c80118032203504e476c0ca229";
        let value = image_value("a/b", (200, 2), b"PNG");
        assert_eq!(hex(&framed(&summary_event(1.5, 300, &value))), image);
    }

    /// 150 is the example of protobuf's documentation ("Encoding").
    #[test]
    fn integers_are_varints() {
        let ten = [&[0xff; 9][..], &[1]].concat();
        let cases: [(u64, &[u8]); 5] =
            [(0, &[0]), (127, &[0x7f]), (128, &[0x80, 1]), (150, &[0x96, 1]), (u64::MAX, &ten)];
        for (value, expected) in cases {
            assert_eq!(Message::default().integer(1, value).0, [&[8], expected].concat());
        }
    }

    #[test]
    fn what_is_written_reads_back_without_what_is_not_finite() {
        let dir = tempfile::tempdir().unwrap();
        let image = RgbImage::from_fn(5, 3, |x, y| image::Rgb([x as u8 * 50, y as u8 * 80, 7]));
        let mut events = EventFile::create(&dir.path().join("a/b")).unwrap();
        for value in [0.25, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, 0.0] {
            events.scalar("loss", 7, value).unwrap();
        }
        events.picture("grid", u64::from(u32::MAX), &image).unwrap();
        events.flush().unwrap();
        let records = read_back(&events.path);
        assert_eq!(records.len(), 4);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert_eq!(timeless(&records[1]), summary_event(0.0, 7, &scalar_value("loss", 0.25)));
        assert_eq!(timeless(&records[2]), summary_event(0.0, 7, &scalar_value("loss", 0.0)));
        let start = records[3].windows(4).position(|w| w == b"\x89PNG").unwrap();
        assert_eq!(image::load_from_memory(&records[3][start..]).unwrap().to_rgb8(), image);
    }

    /// A record with the time 0.
    fn timeless(record: &[u8]) -> Vec<u8> {
        let mut record = record.to_vec();
        record[1..9].fill(0);
        record
    }

    #[test]
    fn a_new_file_replaces_the_earlier_ones_and_no_other_programs() {
        let dir = tempfile::tempdir().unwrap();
        let others = [
            "events.out.tfevents.1700000000.host.1.0",
            "events.out.tfevents.notes.pcpo-wgpu",
            "metrics.jsonl",
        ];
        for name in others {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        // From a clock that was ahead: the next file's name still sorts after it.
        let ahead = format!("{PREFIX}9000000000{SUFFIX}");
        std::fs::write(dir.path().join(&ahead), b"").unwrap();
        for next in ["9000000001", "9000000002"] {
            drop(EventFile::create(dir.path()).unwrap());
            let mut expected = others.map(String::from).to_vec();
            expected.push(format!("{PREFIX}{next}{SUFFIX}"));
            expected.sort();
            assert_eq!(names(dir.path()), expected);
        }
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("taken");
        std::fs::write(&file, b"").unwrap();
        let error = EventFile::create(&file).err().unwrap().to_string();
        assert!(error.contains("taken"), "{error}");
        let earlier = format!("{PREFIX}0000000001{SUFFIX}");
        std::fs::create_dir(dir.path().join(&earlier)).unwrap();
        let error = EventFile::create(dir.path()).err().unwrap().to_string();
        assert!(error.contains(&earlier) && error.contains("cannot be removed"), "{error}");
    }
}
