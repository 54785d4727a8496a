//! What `--device` names: one device, or several.

use anyhow::{Result, anyhow, ensure};

use super::adapters::{Adapter, Opening, adapters, auto, open_with};
use super::compute::Compute;

/// Which of the processes on its machine one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnHost {
    pub index: usize,
    pub of: usize,
}

impl OnHost {
    /// A process alone.
    pub const ALONE: Self = Self { index: 0, of: 1 };

    /// Its own of a machine's devices: every `of`-th, or where there are fewer one of them.
    fn own(self, all: Vec<String>) -> Vec<String> {
        let Self { index, of } = self;
        if all.len() < of {
            return all.into_iter().cycle().skip(index).take(1).collect();
        }
        all.into_iter().skip(index).step_by(of).collect()
    }
}

/// Opens the devices that `--device` names: what [`super::open`] takes, several of it with commas
/// between, or `all` hardware of the graphics API that `auto` takes. Processes that share a machine
/// share them out.
///
/// # Errors
/// As [`super::open`] for each; when an entry is empty, or there is no hardware.
pub fn open_all(wanted: &str, how: Opening, process: OnHost) -> Result<Vec<Compute>> {
    let names = process.own(names(wanted, process)?);
    names.iter().map(|name| open_with(name, how)).collect()
}

/// What `--device` names, one by one.
fn names(wanted: &str, process: OnHost) -> Result<Vec<String>> {
    ensure!(
        !wanted.trim().is_empty(),
        "--device: is empty; give auto, cpu, a number or a part of a name of `pcpo-wgpu devices`"
    );
    let given = || vec![wanted.to_string()];
    match wanted.to_lowercase().as_str() {
        "all" => {
            let all = hardware(&adapters());
            ensure!(
                !all.is_empty(),
                "--device all: there is no hardware GPU; use --device cpu, or software Vulkan by \
                 its name in `pcpo-wgpu devices`"
            );
            Ok(all)
        }
        // Each takes another one.
        "auto" if process.of > 1 => {
            let all = hardware(&adapters());
            Ok(if all.is_empty() { given() } else { all })
        }
        name if name.contains(',') => {
            let known = adapters();
            let known: Vec<&str> = known.iter().map(|a| a.info.name.as_str()).collect();
            split(wanted, &known)
        }
        _ => Ok(given()),
    }
}

/// The numbers of the hardware that is found by one graphics API, `auto`'s choice first: another
/// may find the same cards again.
fn hardware(adapters: &[Adapter]) -> Vec<String> {
    let Some(first) = auto(adapters) else { return Vec::new() };
    let backend = adapters[first].info.backend;
    let more = (0..adapters.len()).filter(|i| {
        *i != first && adapters[*i].is_hardware() && adapters[*i].info.backend == backend
    });
    std::iter::once(first).chain(more).map(|i| i.to_string()).collect()
}

/// Names with commas between. An adapter's whole name may hold some itself.
fn split(wanted: &str, known: &[&str]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut rest = Some(wanted);
    while let Some(text) = rest {
        let whole = |name: &&&str| {
            let found = text.get(..name.len()).filter(|t| t.eq_ignore_ascii_case(name));
            found.is_some() && matches!(text[name.len()..].chars().next(), None | Some(','))
        };
        let known = known.iter().filter(whole).map(|name| name.len()).max();
        let length = known.or_else(|| text.find(',')).unwrap_or(text.len());
        let name = text[..length].trim();
        ensure!(
            !name.is_empty(),
            "--device {wanted}: an entry between the commas is empty; write the devices like 0,1"
        );
        ensure!(
            !["all", "auto"].contains(&name.to_lowercase().as_str()),
            "--device {wanted}: {name} stands alone; name each device, or give {name} without the \
             others"
        );
        names.push(name.to_string());
        rest = text[length..].strip_prefix(',');
    }
    Ok(names)
}

/// Opens the one device that a command takes.
///
/// # Errors
/// As [`open_all`], and where several are named.
pub fn open_one(flag: &str, wanted: &str, how: Opening) -> Result<Compute> {
    let by_flag = |e: anyhow::Error| match flag {
        "--device" => e,
        other => anyhow!("{}", format!("{e:#}").replacen("--device", other, 1)),
    };
    let named = names(wanted, OnHost::ALONE).map_err(by_flag)?;
    ensure!(
        named.len() == 1,
        "{flag} {wanted}: takes one device; runs alone take several, with --device"
    );
    open_with(&named[0], how).map_err(by_flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_name_wins_before_commas_split() {
        let known = ["llvmpipe (LLVM 15, 256 bits)", "llvmpipe"];
        let of = |wanted: &str| split(wanted, &known).unwrap();
        assert_eq!(of("0,1"), ["0", "1"]);
        assert_eq!(of("0, cpu"), ["0", "cpu"]);
        assert_eq!(of("LLVMpipe (llvm 15, 256 bits)"), ["LLVMpipe (llvm 15, 256 bits)"]);
        assert_eq!(of("cpu,llvmpipe (LLVM 15, 256 bits),1")[1], known[0]);
        assert_eq!(of("llvmpipe,llvmpipe"), ["llvmpipe"; 2]);
        assert_eq!(of("llvmpipe (LLVM 15, 512 bits)").len(), 2);
        for bad in ["0,", ",0", "0,,1", ",", "0,all", "auto,cpu"] {
            let error = split(bad, &known).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--device {bad}: ")), "{error}");
        }
    }

    #[test]
    fn processes_share_out_the_devices_of_their_machine() {
        let all = || ["0", "1", "2"].map(String::from).to_vec();
        let of = |index, of| OnHost { index, of }.own(all());
        assert_eq!(of(0, 1), all());
        assert_eq!((of(0, 2), of(1, 2)), (vec!["0".into(), "2".into()], vec!["1".into()]));
        assert_eq!((of(3, 5), of(4, 5)), (vec!["0".to_string()], vec!["1".to_string()]));
    }
}
