//! What the pickles of a PyTorch checkpoint import: classes and functions that Python would run.
//! The reader of checkpoints runs none of them, but passes over what it does not know; a user
//! should hear of it.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};

/// A class or function that a pickle names.
#[derive(Clone, Debug, PartialEq)]
pub struct Import {
    pub module: String,
    pub name: String,
}

/// The number that a checkpoint of before PyTorch 1.6 begins with, as protocol 2 writes it.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The same, as protocols 0 and 1 write it.
const LEGACY_MAGIC_TEXT: &[u8] = b"119547037146038801333356";
/// Pickles at the front of such a file: magic, version, system, object, list of storages.
const LEGACY_PICKLES: usize = 5;
/// A longer list of tensors than any model has.
const MOST_BYTES: u64 = 1 << 28;

/// All imports of a checkpoint's pickles, in the order of the file.
///
/// # Errors
/// When the file is neither a zip archive with a pickle nor a pickle, or is damaged.
pub fn imports(file: &Path) -> Result<Vec<Import>> {
    let map = super::mapped::map(file)?;
    ensure!(
        map.get(257..262) != Some(b"ustar"),
        "it is of PyTorch before 0.1.10; load and save it with a newer one"
    );
    if map.starts_with(b"PK\x03\x04") {
        return scan(&data_pkl(&map)?).map(|(found, _)| found);
    }
    let (mut found, mut at) = scan(&map)?;
    let holds = |magic: &[u8]| map[..at].windows(magic.len()).any(|bytes| bytes == magic);
    if holds(&LEGACY_MAGIC) || holds(LEGACY_MAGIC_TEXT) {
        for _ in 1..LEGACY_PICKLES {
            let (more, length) = scan(&map[at..])?;
            found.extend(more);
            at += length;
        }
    }
    Ok(found)
}

/// The pickle of a zip archive.
fn data_pkl(archive: &[u8]) -> Result<Vec<u8>> {
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(archive))
        .context("its zip archive is damaged; download it again")?;
    let names = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned()));
    let mut pickles = names.filter(|n| n == "data.pkl" || n.ends_with("/data.pkl"));
    let (name, second) = (pickles.next(), pickles.next());
    drop(pickles);
    ensure!(second.is_none(), "its zip archive holds several data.pkl");
    let name = name.ok_or_else(|| anyhow!("its zip archive holds no data.pkl"))?;
    let mut bytes = Vec::new();
    archive
        .by_name(&name)
        .and_then(|entry| Ok(entry.take(MOST_BYTES).read_to_end(&mut bytes)?))
        .context("its data.pkl is damaged; download it again")?;
    Ok(bytes)
}

/// The bytes of a pickle, from front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| anyhow!("its pickle ends early; download it again"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A number of `n` bytes, the lowest first.
    fn number(&mut self, n: usize) -> Result<usize> {
        let bytes = self.take(n)?;
        let number = bytes.iter().rev().fold(0u64, |sum, &b| (sum << 8) | u64::from(b));
        usize::try_from(number).map_err(|_| anyhow!("its pickle is damaged"))
    }

    /// What stands before as many bytes as a number of `n` bytes says.
    fn counted(&mut self, n: usize) -> Result<&'a [u8]> {
        let length = self.number(n)?;
        self.take(length)
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&b| b == b'\n');
        let length = length.ok_or_else(|| anyhow!("its pickle ends early; download it again"))?;
        let line = String::from_utf8_lossy(self.take(length)?).trim_end().to_string();
        self.take(1)?;
        Ok(line)
    }
}

/// The strings that a name of two parts is made of: what was pushed last, and before.
#[derive(Default)]
struct Pushed {
    last: [Option<String>; 2],
    memo: HashMap<usize, Option<String>>,
}

impl Pushed {
    fn push(&mut self, text: Option<String>) {
        let [_, last] = std::mem::take(&mut self.last);
        self.last = [last, text];
    }

    fn keep(&mut self, index: usize) {
        self.memo.insert(index, self.last[1].clone());
    }

    fn recall(&mut self, index: usize) {
        self.push(self.memo.get(&index).cloned().flatten());
    }
}

/// The imports of the pickle that `bytes` begin with, and its length. The operations are those of
/// Python's `pickletools`, protocols 0 to 5.
fn scan(bytes: &[u8]) -> Result<(Vec<Import>, usize)> {
    let mut c = Cursor { bytes, at: 0 };
    let (mut found, mut pushed) = (Vec::new(), Pushed::default());
    let text = |bytes: &[u8]| Some(String::from_utf8_lossy(bytes).into_owned());
    loop {
        let op = c.take(1)?[0];
        match op {
            // STOP
            b'.' => return Ok((found, c.at)),
            // GLOBAL and INST
            b'c' | b'i' => {
                found.push(Import { module: c.line()?, name: c.line()? });
                pushed.push(None);
            }
            // STACK_GLOBAL
            0x93 => {
                let [Some(module), Some(name)] = std::mem::take(&mut pushed.last) else {
                    bail!("its pickle imports something by a name that is put together");
                };
                found.push(Import { module, name });
            }
            // EXT1, EXT2, EXT4: a class by its number in a registry that only Python has.
            0x82..=0x84 => bail!("its pickle imports a class by a number of Python's registry"),
            // Strings: SHORT_BINUNICODE and SHORT_BINSTRING, BINUNICODE and BINSTRING, BINUNICODE8,
            // UNICODE and STRING.
            0x8c | b'U' => pushed.push(text(c.counted(1)?)),
            b'X' | b'T' => pushed.push(text(c.counted(4)?)),
            0x8d => pushed.push(text(c.counted(8)?)),
            b'V' => pushed.push(Some(c.line()?)),
            b'S' => pushed.push(Some(c.line()?.trim_matches(['\'', '"']).to_string())),
            // PUT, BINPUT, LONG_BINPUT and MEMOIZE.
            b'p' => pushed.keep(index(&c.line()?)?),
            b'q' => pushed.keep(c.number(1)?),
            b'r' => pushed.keep(c.number(4)?),
            0x94 => pushed.keep(pushed.memo.len()),
            // GET, BINGET and LONG_BINGET.
            b'g' => pushed.recall(index(&c.line()?)?),
            b'h' => pushed.recall(c.number(1)?),
            b'j' => pushed.recall(c.number(4)?),
            // FRAME and PROTO say nothing.
            0x95 => drop(c.take(8)?),
            0x80 => drop(c.take(1)?),
            _ => {
                skip(op, &mut c)?;
                pushed.push(None);
            }
        }
    }
}

fn index(line: &str) -> Result<usize> {
    line.parse().map_err(|_| anyhow!("its pickle is damaged"))
}

/// Passes over the argument of an operation that neither imports nor names.
fn skip(op: u8, c: &mut Cursor) -> Result<()> {
    match op {
        // BININT1, BININT2, BININT, BINFLOAT
        b'K' => drop(c.take(1)?),
        b'M' => drop(c.take(2)?),
        b'J' => drop(c.take(4)?),
        b'G' => drop(c.take(8)?),
        // LONG1 and SHORT_BINBYTES, LONG4 and BINBYTES, BINBYTES8 and BYTEARRAY8
        0x8a | b'C' => drop(c.counted(1)?),
        0x8b | b'B' => drop(c.counted(4)?),
        0x8e | 0x96 => drop(c.counted(8)?),
        // INT, LONG, FLOAT, PERSID
        b'I' | b'L' | b'F' | b'P' => drop(c.line()?),
        // Operations without an argument.
        b'N'
        | 0x88
        | 0x89
        | b']'
        | b'a'
        | b'e'
        | b'l'
        | b')'
        | b't'
        | 0x85..=0x87
        | b'}'
        | b'd'
        | b's'
        | b'u'
        | 0x8f..=0x91
        | b'0'
        | b'2'
        | b'('
        | b'1'
        | b'R'
        | b'b'
        | b'o'
        | 0x81
        | 0x92
        | b'Q'
        | 0x97
        | 0x98 => {}
        other => bail!("byte {other:#04x} is no operation of a pickle"),
    }
    Ok(())
}
