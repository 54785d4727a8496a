//! Fields of diffusers' config files. A value that is not supported is an error that names it.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use serde_json::Value;

use super::nn::Activation;

/// More layers, levels or heads than any network has: a number beyond is damage, and would be
/// counted through.
const MOST_PARTS: usize = 4096;
/// A wider layer or a longer text than any network has.
const MOST_WIDTH: usize = 1 << 24;
/// The side of a larger latent than any network has: that of `--resolution`'s largest picture.
const MOST_SIDE: usize = 2048;

/// One config.json with its path, for messages.
#[derive(Clone)]
pub struct Config {
    pub path: PathBuf,
    pub json: Value,
}

impl Config {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or not a JSON object.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(&dir.join("config.json"))
    }

    /// Reads a configuration of any name.
    ///
    /// # Errors
    /// When the file is missing or not a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let json: Value = crate::io::read_json(path)?;
        ensure!(json.is_object(), "{}: is not a JSON object", path.display());
        Ok(Self { json, path: path.to_path_buf() })
    }

    /// The error that a field's value calls for.
    pub fn bad(&self, field: &str, what: &str) -> anyhow::Error {
        anyhow!("{}: {field} = {} {what}", self.path.display(), self.json[field])
    }

    fn whole(&self, field: &str, value: &Value, most: usize) -> Result<usize> {
        let n = value.as_u64().ok_or_else(|| self.bad(field, "is not a whole number"))?;
        let n = usize::try_from(n).ok().filter(|&n| n <= most);
        n.ok_or_else(|| self.bad(field, &format!("is more than {most}: the file is damaged")))
    }

    /// A width, a size or an identifier, with a default for an absent or null field.
    ///
    /// # Errors
    /// When it is not a whole number, or larger than any network's.
    pub fn size(&self, field: &str, default: usize) -> Result<usize> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => self.whole(field, v, MOST_WIDTH),
        }
    }

    /// A width that has to be positive.
    ///
    /// # Errors
    /// As [`Self::size`], and when it is 0.
    pub fn width(&self, field: &str, default: usize) -> Result<usize> {
        let n = self.size(field, default)?;
        ensure!(n > 0, self.bad(field, "must be positive"));
        Ok(n)
    }

    /// How many parts there are, at least one.
    ///
    /// # Errors
    /// When it is not a whole number, 0, or larger than any network's.
    pub fn count(&self, field: &str, default: usize) -> Result<usize> {
        let n = self.count_or_none(field, default)?;
        ensure!(n > 0, self.bad(field, "must be positive"));
        Ok(n)
    }

    /// How many parts there are, which may be none.
    ///
    /// # Errors
    /// When it is not a whole number, or larger than any network's.
    pub fn count_or_none(&self, field: &str, default: usize) -> Result<usize> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => self.whole(field, v, MOST_PARTS),
        }
    }

    /// How many heads share a width.
    ///
    /// # Errors
    /// As [`Self::count`], and when they do not divide the width.
    pub fn heads(&self, field: &str, default: usize, width: usize) -> Result<usize> {
        let heads = self.count(field, default)?;
        ensure!(
            width.is_multiple_of(heads),
            self.bad(field, &format!("does not divide the width {width}"))
        );
        Ok(heads)
    }

    /// A number for each of three channels.
    ///
    /// # Errors
    /// When it is not a list of three numbers.
    pub fn channels(&self, field: &str, default: [f32; 3]) -> Result<[f32; 3]> {
        if self.json[field].is_null() {
            return Ok(default);
        }
        let numbers: Option<Vec<f32>> = self.json[field]
            .as_array()
            .and_then(|list| list.iter().map(|v| v.as_f64().map(|n| n as f32)).collect());
        let three = numbers.and_then(|n| <[f32; 3]>::try_from(n).ok());
        three.ok_or_else(|| self.bad(field, "is not a list of 3 numbers"))
    }

    /// A number.
    pub fn float(&self, field: &str, default: f64) -> Result<f64> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => v.as_f64().ok_or_else(|| self.bad(field, "is not a number")),
        }
    }

    /// What is added below a root.
    ///
    /// # Errors
    /// When it is not a number, or negative.
    pub fn eps(&self, field: &str, default: f64) -> Result<f64> {
        let value = self.float(field, default)?;
        ensure!(value >= 0.0, self.bad(field, "must not be negative"));
        Ok(value)
    }

    /// Widths of the `N` axes of a rotary embedding of heads of a width.
    ///
    /// # Errors
    /// When they are not so many even numbers that add up to it.
    pub fn axes<const N: usize>(
        &self,
        field: &str,
        default: [usize; N],
        head: usize,
    ) -> Result<Vec<usize>> {
        let axes = if self.json[field].is_null() { default.to_vec() } else { self.list(field)? };
        let fits = axes.len() == N && axes.iter().sum::<usize>() == head;
        let what = format!("must be {N} even numbers that add up to a head's width, {head}");
        ensure!(fits && axes.iter().all(|a| a % 2 == 0), self.bad(field, &what));
        Ok(axes)
    }

    /// A number that something is divided by.
    ///
    /// # Errors
    /// When it is not a number, or not positive.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64> {
        let value = self.float(field, default)?;
        ensure!(value > 0.0, self.bad(field, "must be positive"));
        Ok(value)
    }

    /// true or false.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => v.as_bool().ok_or_else(|| self.bad(field, "is not true or false")),
        }
    }

    /// A string.
    pub fn text(&self, field: &str, default: &str) -> Result<String> {
        match &self.json[field] {
            Value::Null => Ok(default.to_string()),
            v => v.as_str().map(str::to_string).ok_or_else(|| self.bad(field, "is not a string")),
        }
    }

    /// A list of strings, one for each block: at least one.
    pub fn names(&self, field: &str, default: &[&str]) -> Result<Vec<String>> {
        let bad = || self.bad(field, "is not a list of strings");
        let names: Vec<String> = match &self.json[field] {
            Value::Null => default.iter().map(|s| s.to_string()).collect(),
            Value::Array(list) => list
                .iter()
                .map(|v| v.as_str().map(str::to_string).ok_or_else(bad))
                .collect::<Result<_>>()?,
            _ => return Err(bad()),
        };
        ensure!(!names.is_empty(), self.bad(field, "holds no block"));
        ensure!(names.len() <= MOST_PARTS, self.bad(field, "holds more blocks than any network"));
        Ok(names)
    }

    /// A list of whole numbers; empty for an absent field.
    pub fn list(&self, field: &str) -> Result<Vec<usize>> {
        match &self.json[field] {
            Value::Null => Ok(vec![]),
            Value::Array(list) => list.iter().map(|v| self.whole(field, v, MOST_WIDTH)).collect(),
            _ => Err(self.bad(field, "is not a list of whole numbers")),
        }
    }

    /// The sides of the latents that a network was made for, one for both or a list of two.
    pub fn sides(&self, field: &str, default: usize) -> Result<[usize; 2]> {
        let sides = self.each(field, 2, &[default], MOST_SIDE)?;
        Ok([sides[0], sides[1]])
    }

    /// A positive width, or a list of `n` of them, one for each block; `default` is one for all or
    /// the `n` themselves, and without a default the field has to be there.
    pub fn widths(&self, field: &str, n: usize, default: &[usize]) -> Result<Vec<usize>> {
        self.each(field, n, default, MOST_WIDTH)
    }

    /// A positive count, or a list of `n` of them, one for each block.
    pub fn counts(&self, field: &str, n: usize, default: usize) -> Result<Vec<usize>> {
        self.each(field, n, &[default], MOST_PARTS)
    }

    fn each(&self, field: &str, n: usize, default: &[usize], most: usize) -> Result<Vec<usize>> {
        let list = match &self.json[field] {
            Value::Null if default.len() == 1 => vec![default[0]; n],
            Value::Null if default.len() == n => default.to_vec(),
            Value::Null => bail!(self.bad(field, &format!("must have {n} entries, one a block"))),
            Value::Array(list) => {
                list.iter().map(|v| self.whole(field, v, most)).collect::<Result<_>>()?
            }
            v => vec![self.whole(field, v, most)?; n],
        };
        let entries = list.len();
        ensure!(entries == n, self.bad(field, &format!("has {entries} entries for {n} blocks")));
        ensure!(list.iter().all(|&x| x > 0), self.bad(field, "must be positive"));
        Ok(list)
    }

    /// One flag, or a list of `n`.
    pub fn flags(&self, field: &str, n: usize) -> Result<Vec<bool>> {
        match &self.json[field] {
            Value::Null => Ok(vec![false; n]),
            Value::Bool(b) => Ok(vec![*b; n]),
            Value::Array(list) if list.len() == n => list
                .iter()
                .map(|v| v.as_bool().ok_or_else(|| self.bad(field, "is not a list of flags")))
                .collect(),
            _ => Err(self.bad(field, &format!("is not a flag or a list of {n}"))),
        }
    }

    /// An activation by its name.
    pub fn activation(&self, field: &str, default: &str) -> Result<Activation> {
        match self.text(field, default)?.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "quick_gelu" => Ok(Activation::QuickGelu),
            "relu" => Ok(Activation::Relu),
            _ => Err(self.bad(field, "is not supported; silu, gelu, quick_gelu and relu are")),
        }
    }

    /// Checks that a number of groups divides all widths.
    ///
    /// # Errors
    /// Names the width that it does not divide.
    pub fn divides(&self, field: &str, part: usize, widths: &[usize]) -> Result<()> {
        for &width in widths {
            ensure!(
                part > 0 && width.is_multiple_of(part),
                self.bad(field, &format!("does not divide {width} channels"))
            );
        }
        Ok(())
    }

    /// Refuses every field of `fields` whose value is neither absent, null, nor the one given.
    ///
    /// # Errors
    /// Names the first such field.
    pub fn only(&self, fields: &[(&str, Value)]) -> Result<()> {
        for (field, supported) in fields {
            let found = &self.json[*field];
            if !found.is_null() && found != supported {
                bail!(self.bad(field, &format!("is not supported; only {supported} or null is")));
            }
        }
        Ok(())
    }
}

/// Sizes of one block for one row of its input, in elements: what the memory estimate counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BlockShape {
    /// Its input with everything that waits beside it (skip connections, text tokens): what
    /// checkpointing keeps.
    pub input: f64,
    /// The stream that it works on.
    pub stream: f64,
    /// The widest tensor of its feed-forward.
    pub wide: f64,
    /// Attention scores.
    pub scores: f64,
    /// Transformer layers after one another, each with a stream and a feed-forward; 0 counts as
    /// one.
    pub depth: f64,
}

/// Attention scores of all rows that a block is differentiated for at a time: 256 MiB a copy.
const SCORES_AT_ONCE: f64 = (1 << 26) as f64;

/// Rows that a block of a network is differentiated for at a time. A function of the shapes alone,
/// so that a run resumes to the bit.
pub fn rows_at_once(blocks: &[BlockShape]) -> usize {
    let most = blocks.iter().map(|b| b.scores).fold(1.0, f64::max);
    ((SCORES_AT_ONCE / most) as usize).max(1)
}

/// What a network is from outside, read from its configuration alone.
pub trait NetworkConfig {
    /// Shape of the latents that it was made for, `[C, H, W]`.
    fn latent_shape(&self) -> [usize; 3];

    /// Widths of the sequence and of the pooled embedding (0 without one) that it is conditioned
    /// on.
    fn context(&self) -> [usize; 2];

    /// Whether it is told sizes in pixels, as SDXL is.
    fn takes_time_ids(&self) -> bool {
        false
    }

    /// Whether guidance was distilled into it: one pass replaces the two of classifier-free
    /// guidance.
    fn distilled(&self) -> bool;

    /// The scale of u + s (c - u) that a scale of its published pipeline stands for.
    fn guidance(&self, scale: f64) -> f64 {
        scale
    }

    /// Tokens that it makes of a latent of a height and width: what dynamic shifting depends on.
    fn tokens(&self, size: [usize; 2]) -> usize;

    /// Whether its blocks convolve, as a UNet's do: the memory estimate counts such blocks
    /// otherwise.
    fn convolves(&self) -> bool;

    /// Its blocks for latents of a height and width and so many text tokens, in the order in which
    /// they run.
    fn block_shapes(&self, size: [usize; 2], text: usize) -> Vec<BlockShape>;
}
