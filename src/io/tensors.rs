//! Tensors on the host, and safetensors files written from them piece by piece.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

/// A named f32 tensor on the host, in row-major order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl HostTensor {
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self { name: name.into(), shape: shape.into(), values }
    }
}

/// A tensor to write, whose values lie in several places.
pub struct TensorParts<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    pub parts: Vec<&'a [f32]>,
}

/// Writes f32 tensors with string metadata, whole or not at all.
///
/// # Errors
/// As [`super::write()`].
pub fn write_tensors(
    path: &Path,
    tensors: &[HostTensor],
    metadata: &[(&str, String)],
) -> Result<()> {
    let parts = tensors.iter().map(|t| TensorParts {
        name: t.name.clone(),
        shape: t.shape.clone(),
        parts: vec![&t.values],
    });
    write_parts(path, parts.collect(), metadata)
}

/// Writes f32 tensors from where their values lie: nothing is copied on the way to the file.
///
/// The library's own writer takes one slice a tensor, and orders metadata by chance; here tensors
/// and metadata are sorted, so that equal runs write equal files.
///
/// # Errors
/// As [`super::write()`], and when values and shape of a tensor disagree.
pub fn write_parts(
    path: &Path,
    mut tensors: Vec<TensorParts>,
    metadata: &[(&str, String)],
) -> Result<()> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let mut described = Vec::new();
    for t in &tensors {
        let count: usize = t.parts.iter().map(|p| p.len()).sum();
        ensure!(
            count == t.shape.iter().product::<usize>(),
            "{}: tensor {} has {count} values for shape {:?}",
            path.display(),
            t.name,
            t.shape
        );
        let size = size_of::<f32>();
        described.push(Described { name: &t.name, dtype: "F32", size, shape: &t.shape });
    }
    write_file(path, metadata, &described, |out| {
        tensors
            .iter()
            .flat_map(|t| &t.parts)
            .try_for_each(|p| out.write_all(bytemuck::cast_slice(p)))
    })
}

/// A tensor as a file's header has it.
pub(super) struct Described<'a> {
    pub name: &'a str,
    /// In safetensors' words, and bytes of an element.
    pub dtype: &'static str,
    pub size: usize,
    pub shape: &'a [usize],
}

/// Writes a safetensors file whole or not at all; `body` writes the tensors' bytes in the order in
/// which they are described.
///
/// # Errors
/// As [`super::write()`].
pub(super) fn write_file(
    path: &Path,
    metadata: &[(&str, String)],
    tensors: &[Described],
    body: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let mut header = Map::new();
    let metadata: Map<String, Value> =
        metadata.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
    header.insert("__metadata__".into(), Value::Object(metadata));
    let mut offset = 0;
    for Described { name, dtype, size, shape } in tensors {
        let end = offset + size * shape.iter().product::<usize>();
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.to_string(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Tensors start at a multiple of 8.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    super::write_with(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        body(&mut out)?;
        out.flush()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::weights::Weights;

    #[test]
    fn what_is_written_reads_back_and_equal_tensors_make_equal_files() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let tensors = [
            HostTensor::new("z", [2, 2], vec![1.0, 2.0, 3.0, 4.0]),
            HostTensor::new("y", [], vec![5.0]),
        ];
        let metadata = [("n", "1".to_string()), ("m", "2".to_string())];
        write_tensors(&a, &tensors, &metadata).unwrap();
        let parts = vec![
            TensorParts { name: "y".into(), shape: vec![], parts: vec![&[5.0]] },
            TensorParts {
                name: "z".into(),
                shape: vec![2, 2],
                parts: vec![&[1.0], &[2.0, 3.0, 4.0]],
            },
        ];
        write_parts(&b, parts, &[("m", "2".into()), ("n", "1".into())]).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let read = Weights::open_file(&a).unwrap();
        assert_eq!(read.f32("z").unwrap(), tensors[0]);
        assert_eq!(read.rows("z", 1..2, &[2]).unwrap(), [3.0, 4.0]);
        assert_eq!(read.metadata("n").unwrap().as_deref(), Some("1"));
        assert!(read.rows("y", 0..1, &[]).is_err(), "a tensor of no dimension has no rows");
        let wrong = [HostTensor::new("x", [3], vec![1.0])];
        assert!(write_tensors(&a, &wrong, &[]).is_err());
    }
}
