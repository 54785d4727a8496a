//! PyTorch's checkpoints (`torch.save`): tensors without running anything that a file holds.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pytorch_reader::{DType, PytorchReader, Tensor};
use safetensors::Dtype;

use super::imports::imports;

/// What the pickle of a state dict imports: how tensors are put together again, and their types.
const KNOWN: [(&str, &[&str]); 7] = [
    ("collections", &["OrderedDict"]),
    // How protocol 2 writes bytes and sets.
    ("_codecs", &["encode"]),
    ("__builtin__", &["set", "frozenset"]),
    ("builtins", &["set", "frozenset"]),
    ("torch.storage", &["UntypedStorage", "TypedStorage"]),
    ("torch.nn.parameter", &["Parameter"]),
    (
        "torch._utils",
        &[
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        ],
    ),
];

/// Types of elements, which `torch` itself holds.
const ELEMENTS: [&str; 6] = ["float64", "float32", "float16", "bfloat16", "int64", "uint8"];

fn known(module: &str, name: &str) -> bool {
    let listed = KNOWN.iter().any(|(m, names)| *m == module && names.contains(&name));
    let storage = name.ends_with("Storage") || ELEMENTS.contains(&name) || name == "Size";
    listed || (module == "torch" && storage)
}

/// Whether a file is meant to be a checkpoint, by the end of its name.
pub fn is_one(file: &Path) -> bool {
    let end = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ["pt", "pth", "bin", "ckpt"].contains(&end.to_ascii_lowercase().as_str())
}

/// The tensors of a checkpoint with their names; their bytes are read when asked for, wherever
/// they were saved from. Plain values beside them are passed over.
///
/// # Errors
/// When the file is missing, damaged or no checkpoint; when it imports a class or function that a
/// state dict does not need, which is named.
pub fn open(file: &Path) -> Result<Vec<Tensor>> {
    let path = file.display();
    ensure!(file.exists(), "{path}: there is no such file");
    ensure!(file.is_file(), "{path}: is not a regular file");
    for import in imports(file).with_context(|| format!("{path}: is not a PyTorch checkpoint"))? {
        ensure!(
            known(&import.module, &import.name),
            "{path}: its pickle imports {}.{}, which a state dict does not need and which is not \
             run; save the state dict alone, by `torch.save(model.state_dict(), ..)` or as \
             safetensors",
            import.module,
            import.name
        );
    }
    let reader = PytorchReader::new(file)
        .map_err(|e| anyhow!("{path}: cannot be read as a PyTorch checkpoint: {e}"))?;
    let tensors: Vec<Tensor> = reader.into_tensors().into_values().collect();
    if tensors.is_empty() {
        bail!("{path}: holds no tensor; save the model's state dict");
    }
    Ok(tensors)
}

/// The type of safetensors for one of PyTorch's; none for flags, which no weight is.
pub fn dtype(of: DType) -> Option<Dtype> {
    Some(match of {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => return None,
    })
}
