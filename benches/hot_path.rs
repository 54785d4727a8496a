//! `cargo bench`: every operation of the hot path as shader, CPU reference and Burn tensor
//! operations on one device, over sizes and batches, and the kernels of networks at the sizes of
//! Stable Diffusion 1.5, values checked before anything is timed; then one epoch of the blue job by
//! phase.
//!
//! The shaders by name: ddim_step and flow_step with step_log_prob, log_ratio with
//! log_ratio_finish, policy_objective, credit_reduce, philox_noise, with the preludes common,
//! philox, sampler_step, partials_sum, lanes1 and lanes4; frozen_conv with frozen_conv_gradient,
//! frozen_linear with frozen_linear_gradient, group_norm_silu with group_norm_silu_gradient,
//! layer_norm with layer_norm_gradient, rms_norm with rms_norm_gradient, geglu with geglu_gradient,
//! activation with activation_gradient, attention with attention_delta, attention_gradient_q and
//! attention_gradient_kv.
//!
//! divan times each path by itself; the table after it has the ratios, whose paths are measured in
//! turn at one size.
//!
//! PCPO_BENCH_DEVICE names the device (default: auto, or lavapipe where that is the CPU);
//! PCPO_BENCH_QUICK=1 takes three sizes; PCPO_BENCH_EPOCH=0 leaves the epoch out.

use std::fmt;
use std::process::Command;
use std::sync::OnceLock;

use divan::Bencher;
use pcpo_wgpu::device::adapters::{adapters, auto};
use pcpo_wgpu::device::{Compute, open};
use pcpo_wgpu::tools::bench::{Case, Operation, reduction_row};
use pcpo_wgpu::tools::bench_kernels::{SMALL, STABLE_DIFFUSION, kernel_lines};
use pcpo_wgpu::tools::timing::{Selection, header, row};

/// The device, opened once: Burn keeps one runtime a device.
fn compute() -> &'static Compute {
    static COMPUTE: OnceLock<Compute> = OnceLock::new();
    COMPUTE.get_or_init(|| {
        let fallback = if auto(&adapters()).is_some() { "auto" } else { "lavapipe" };
        let wanted = std::env::var("PCPO_BENCH_DEVICE").unwrap_or_else(|_| fallback.into());
        open(&wanted).unwrap_or_else(|e| panic!("PCPO_BENCH_DEVICE: {e:#}"))
    })
}

/// A batch of latents.
#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    shape: [usize; 3],
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [c, h, w] = self.shape;
        write!(f, "{} x {c}x{h}x{w}", self.batch)
    }
}

fn sizes() -> Vec<Size> {
    let quick = std::env::var_os("PCPO_BENCH_QUICK").is_some();
    let shapes: &[[usize; 3]] = if quick {
        &[[4, 64, 64]]
    } else {
        &[[4, 16, 16], [4, 64, 64], [4, 128, 128], [16, 128, 128]]
    };
    let batches: &[usize] = if quick { &[1, 8] } else { &[1, 8, 64] };
    let all =
        shapes.iter().flat_map(|&shape| batches.iter().map(move |&batch| Size { batch, shape }));
    // The Burn path's intermediates of the largest case would not fit one binding of software
    // Vulkan.
    all.filter(|s| s.batch * s.shape.iter().product::<usize>() <= 8 << 20).collect()
}

/// One operation's three paths, each checked against the others before it is timed.
fn time(bencher: Bencher, size: Size, operation: Operation, path: impl Fn(&Case)) {
    let case = Case::new(compute(), size.batch, size.shape).unwrap_or_else(|e| panic!("{e:#}"));
    case.verify(operation).unwrap_or_else(|e| panic!("{e:#}"));
    bencher.bench_local(|| {
        path(&case);
        compute().sync().expect("the device works");
    });
}

macro_rules! operations {
    ($($name:ident: $operation:ident),*) => {$(
        #[divan::bench_group(sample_count = 10, sample_size = 1, max_time = 1)]
        mod $name {
            use super::*;

            const OPERATION: Operation = Operation::$operation;

            #[divan::bench(args = sizes())]
            fn shader(bencher: Bencher, size: Size) {
                let run = |case: &Case| drop(case.shader(OPERATION));
                time(bencher, size, OPERATION, run);
            }

            #[divan::bench(args = sizes())]
            fn reference(bencher: Bencher, size: Size) {
                time(bencher, size, OPERATION, |case| drop(case.reference(OPERATION)));
            }

            #[divan::bench(args = sizes())]
            fn burn(bencher: Bencher, size: Size) {
                time(bencher, size, OPERATION, |case| case.run_tensor_operations(OPERATION));
            }
        }
    )*};
}

operations!(
    philox_noise: PhiloxNoise,
    ddim_step: DdimStep,
    flow_step: FlowStep,
    log_ratio: LogRatio,
    policy_objective: PolicyObjective
);

fn main() -> anyhow::Result<()> {
    divan::main();
    let compute = compute();
    println!("fusion {}", if cfg!(feature = "fusion") { "on" } else { "off" });
    println!("{}", header());
    for size in sizes() {
        let case = Case::new(compute, size.batch, size.shape)?;
        for operation in Operation::ALL {
            case.verify(operation)?;
            println!("{}", row(operation.name(), &size.to_string(), case.times(operation)?));
        }
    }
    for (steps, samples) in [(20, 32), (50, 256)] {
        println!("{}", reduction_row(compute, steps, samples)?);
    }
    let small = std::env::var_os("PCPO_BENCH_QUICK").is_some();
    let sizes = if small { SMALL } else { STABLE_DIFFUSION };
    kernel_lines(compute, sizes, &Selection::default(), |line| println!("{line}"))?;
    if std::env::var_os("PCPO_BENCH_EPOCH").is_none_or(|v| v != "0") {
        epoch()?;
    }
    Ok(())
}

/// One epoch of `models/emoji/blue.toml` on the CPU device, split into its phases.
fn epoch() -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("pcpo-bench-{}", std::process::id()));
    let status = Command::new(env!("CARGO_BIN_EXE_pcpo-wgpu"))
        .args(["train", "--config", "models/emoji/blue.toml", "--device", "cpu"])
        .args(["--epochs", "1", "--out"])
        .arg(&folder)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdout(std::process::Stdio::null())
        .status()?;
    anyhow::ensure!(status.success(), "the epoch failed");
    let text = std::fs::read_to_string(folder.join("metrics.jsonl"))?;
    let line = text.lines().find(|l| l.contains("\"kind\":\"epoch\"")).unwrap_or_default();
    let line: serde_json::Value = serde_json::from_str(line)?;
    let phase = |name: &str| line[format!("{name}_seconds")].as_f64().unwrap_or(f64::NAN);
    println!("one epoch of the blue job on the CPU, seconds:");
    for name in ["rollout", "decode", "reward", "update"] {
        println!("  {name:<8} {:.2}", phase(name));
    }
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
