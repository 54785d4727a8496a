//! What tests share: paths and devices.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use pcpo_wgpu::device::adapters::{Opening, adapters};
use pcpo_wgpu::device::{Compute, open, open_with};
use pcpo_wgpu::model::{Component, ModelFiles};

pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn emoji() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/emoji")
}

/// A part of a model, by its folder.
pub fn part(dir: impl AsRef<Path>) -> Component {
    Component::folder(dir.as_ref()).unwrap()
}

/// A model's folder.
pub fn files(dir: &Path) -> ModelFiles {
    ModelFiles::folder(dir).unwrap()
}

pub fn cpu() -> Compute {
    Compute::cpu()
}

/// The GPU that tests run on: PCPO_TEST_DEVICE, or software Vulkan, or where there is none the
/// first adapter.
pub fn gpu_name() -> String {
    let lavapipe = || adapters().iter().any(|a| a.info.name.to_lowercase().contains("llvmpipe"));
    let found = || if lavapipe() { "lavapipe" } else { "0" }.to_string();
    std::env::var("PCPO_TEST_DEVICE").unwrap_or_else(|_| found())
}

/// [`gpu_name`], opened once: Burn keeps one runtime a device.
pub fn gpu() -> Compute {
    static GPU: OnceLock<Compute> = OnceLock::new();
    let wanted = gpu_name();
    let hint = "install a Vulkan driver (Debian: mesa-vulkan-drivers), or set PCPO_TEST_DEVICE";
    GPU.get_or_init(|| {
        pcpo_wgpu::device::gpu::poison_outputs();
        open(&wanted).unwrap_or_else(|e| panic!("{e:#}; {hint}"))
    })
    .clone()
}

/// The same GPU with other kernels: those of hardware where it is software, or those that take f16.
pub fn gpu_with(how: Opening) -> Compute {
    open_with(&gpu_name(), how).unwrap()
}

/// What a program said on stderr.
pub fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A reward program for `--reward`, in the language that the system has: sh, or PowerShell.
pub fn reward_program(sh: &str, powershell: &str) -> String {
    if cfg!(windows) {
        format!("command:powershell -NoProfile -Command \"{powershell}\"")
    } else {
        format!("command:{sh}")
    }
}

/// A reward program that does the same for every line it reads, which is `l` there.
pub fn for_every_line(sh: &str, powershell: &str) -> String {
    let powershell =
        format!("while ($null -ne ($l = [Console]::In.ReadLine())) {{ {powershell} }}");
    reward_program(&format!("while read l; do {sh}; done"), &powershell)
}

/// [`for_every_line`], with one answer.
pub fn answers(sh: &str, powershell: &str) -> String {
    for_every_line(&format!("echo {sh}"), &format!("[Console]::Out.WriteLine({powershell})"))
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            std::fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}
