//! `cargo bench`: every operation of the hot path as shader, CPU reference and Burn tensor operations on one device,
//! over sizes and batches, values checked before anything is timed; then one epoch of the default job by phase.
//!
//! The shaders by name: ddim_step with ddim_log_prob, log_ratio with log_ratio_finish, policy_objective, credit_reduce,
//! philox_noise, with the preludes common, philox, lanes1 and lanes4.
//!
//! Not criterion or divan: the figures that matter are ratios of three paths measured in turn in one run, which their
//! reports do not make, and each would be one more tree of crates in every clean build. The timing is a median over at
//! least 5 synchronised runs.
//!
//! PCPO_BENCH_DEVICE names the device (default: auto, or lavapipe where that is the CPU); PCPO_BENCH_QUICK=1 takes
//! three sizes; PCPO_BENCH_EPOCH=0 leaves the epoch out.

use std::process::Command;

use pcpo_wgpu::bench::{Case, OPERATIONS, reduction_row};
use pcpo_wgpu::device::{adapters, auto, open};

fn main() -> anyhow::Result<()> {
    let fallback = if auto(&adapters()).is_some() { "auto" } else { "lavapipe" };
    let wanted = std::env::var("PCPO_BENCH_DEVICE").unwrap_or_else(|_| fallback.into());
    let compute = open(&wanted)?;
    let quick = std::env::var_os("PCPO_BENCH_QUICK").is_some();
    let shapes: &[[usize; 3]] =
        if quick { &[[4, 64, 64]] } else { &[[4, 16, 16], [4, 64, 64], [4, 128, 128], [16, 128, 128]] };
    let batches: &[usize] = if quick { &[1, 8] } else { &[1, 8, 64] };
    println!("fusion {}", if cfg!(feature = "fusion") { "on" } else { "off" });
    println!(
        "{:<18} {:>16} {:>12} {:>14} {:>12} {:>12}",
        "operation", "batch x latent", "shader ms", "reference ms", "Burn ms", "Burn/shader"
    );
    for &shape in shapes {
        for &batch in batches {
            let size = format!("{batch} x {}x{}x{}", shape[0], shape[1], shape[2]);
            // The Burn path's intermediates of the largest case would not fit one binding of software Vulkan.
            if batch * shape.iter().product::<usize>() > 8 << 20 {
                println!("{:<18} {size:>16} left out: guided output past 64 MiB", "all");
                continue;
            }
            let case = Case::new(&compute, batch, shape);
            for operation in OPERATIONS {
                case.verify(operation)?;
                let [shader, reference, burn] = case.times(operation)?;
                println!(
                    "{operation:<18} {size:>16} {:>12.3} {:>14.3} {:>12.3} {:>11.1}x",
                    1e3 * shader,
                    1e3 * reference,
                    1e3 * burn,
                    burn / shader
                );
            }
        }
    }
    for (steps, samples) in [(20, 32), (50, 256)] {
        println!("{}", reduction_row(&compute, steps, samples)?);
    }
    if std::env::var_os("PCPO_BENCH_EPOCH").is_none_or(|v| v != "0") {
        epoch()?;
    }
    Ok(())
}

/// One epoch of the default job on the CPU device, split into its phases.
fn epoch() -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("pcpo-bench-{}", std::process::id()));
    let status = Command::new(env!("CARGO_BIN_EXE_pcpo-wgpu"))
        .args(["train", "--device", "cpu", "--epochs", "1", "--out"])
        .arg(&folder)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdout(std::process::Stdio::null())
        .status()?;
    anyhow::ensure!(status.success(), "the epoch failed");
    let text = std::fs::read_to_string(folder.join("metrics.jsonl"))?;
    let line = text.lines().find(|l| l.contains("\"kind\":\"epoch\"")).unwrap_or_default();
    let line: serde_json::Value = serde_json::from_str(line)?;
    let phase = |name: &str| line[format!("{name}_seconds")].as_f64().unwrap_or(f64::NAN);
    println!("one epoch of the default job on the CPU, seconds:");
    for name in ["rollout", "decode", "reward", "update"] {
        println!("  {name:<8} {:.2}", phase(name));
    }
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
