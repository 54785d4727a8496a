//! Objectives of the forward process: their formulas against f64 and central differences, and whole
//! updates against PyTorch's gradients (tests/golden/update).

use burn::tensor::Tensor;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::{host, upload};
use pcpo_wgpu::io::tensors::HostTensor;
use pcpo_wgpu::lora::formats::{Format, tensors};
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::ops::forward_objective::{
    ForwardObjective, ForwardPredictions, ForwardSurrogate, ForwardTime, forward_objective,
};
use pcpo_wgpu::ops::policy_objective::GuidanceGradient;
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::sampling::fleet::Batch;
use pcpo_wgpu::sampling::policy::{GuidanceMode, Policy, PromptPair};
use pcpo_wgpu::sampling::trajectory::Noise;
use pcpo_wgpu::schedule::{Grid, Sampler, Sampling, Step};
use pcpo_wgpu::train::forward::{ForwardOptions, forward_gradient};
use pcpo_wgpu::train::plan::Part;
use pcpo_wgpu::train::update::TrajectoryBatch;
use pcpo_wgpu::train::update_gradient::UpdateGradient;

use crate::support::{cpu, emoji, files, golden, gpu};
use crate::update::dump::{Dump, Gradients};
use crate::update::{torch, worst};

/// Values of one latent: 48 of them, as METHOD2 9.7 has it.
const SHAPE: [usize; 4] = [1, 3, 4, 4];
const DIM: usize = 48;
/// A flow's time.
const T: f64 = 0.37;

fn draw(i: u32) -> Vec<f64> {
    noise(5, Stream::Evaluation, i, 0, DIM).into_iter().map(f64::from).collect()
}

fn time() -> ForwardTime {
    let t = T as f32;
    ForwardTime { signal: 1.0 - t, noise: t, x0_x: 1.0, x0_p: t }
}

/// Gradient and loss of a row by the operation, with predictions now and of the old policy.
fn found(
    compute: &Compute,
    objective: ForwardObjective,
    [now, old]: [&[f64]; 2],
    advantage: f32,
) -> (Vec<f64>, f64) {
    let tensor = |values: &[f64]| -> Tensor<4> {
        let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        upload(&values, SHAPE, &compute.burn)
    };
    let (x0, z) = (tensor(&draw(0)), tensor(&draw(1)));
    let x = time().noised(&x0, &z);
    let surrogate = ForwardSurrogate { objective, clamp: 5.0, kl_beta: 0.0, scale: 1.0 };
    let (now, old) = (tensor(now), tensor(old));
    let p = ForwardPredictions { now: &now, old: &old, sampled: None, base: None };
    let done = forward_objective(&surrogate, &time(), &x, &x0, &p, &[advantage]);
    let gradient = host(&done.gradient).iter().map(|g| f64::from(*g)).collect();
    (gradient, f64::from(host(&done.stats)[1]))
}

/// v* = z - x0 of the row.
fn wanted() -> Vec<f64> {
    draw(1).iter().zip(draw(0)).map(|(z, x0)| z - x0).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    values.sum::<f64>() / DIM as f64
}

fn close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    let largest = expected.iter().fold(1e-12f64, |m, v| m.max(v.abs()));
    let off = found.iter().zip(expected).fold(0f64, |m, (f, e)| m.max((f - e).abs()));
    assert!(off <= tolerance * largest, "{what}: off by {off:e} of {largest:e}");
}

/// METHOD2 9.7: at v = v_old NFT's gradient is an advantage-weighted regression, whatever b is; it
/// vanishes for an advantage of 0, and where v has gone (2q - 1)/b of the way.
#[test]
fn nft_is_an_advantage_weighted_regression() {
    let old = draw(2);
    let away: Vec<f64> = wanted().iter().zip(&old).map(|(w, v)| w - v).collect();
    let size = mean(away.iter().map(|d| d.abs()));
    for compute in [cpu(), gpu()] {
        for beta in [0.1, 1.0, 3.0] {
            let nft = ForwardObjective::Nft { beta };
            for advantage in [1.5f32, -4.0] {
                let factor = -2.0 * f64::from(advantage) * T / (DIM as f64 * size);
                let expected: Vec<f64> = away.iter().map(|d| factor * d).collect();
                let gradient = found(&compute, nft, [&old, &old], advantage).0;
                close(&gradient, &expected, 2e-5, &format!("b {beta}, A {advantage}"));
            }
            let none = found(&compute, nft, [&old, &old], 0.0).0;
            let scale = T / (DIM as f64 * size);
            assert!(none.iter().all(|g| g.abs() < 1e-5 * scale), "{none:?}");
        }
        // At its minimum with the sizes held. An advantage of +-5 has one of the two errors alone,
        // over its size: the sizes are put back to what they were at v_old.
        let (beta, advantage) = (0.5, 2.0);
        let q = 0.5 + advantage / 10.0;
        let part = (2.0 * q - 1.0) / beta;
        let there: Vec<f64> = old.iter().zip(&away).map(|(v, d)| v + part * d).collect();
        let nft = ForwardObjective::Nft { beta: beta as f32 };
        let one = |advantage: f32| found(&compute, nft, [&there, &old], advantage).0;
        let (toward, back) = (one(5.0), one(-5.0));
        // |e+| and |e-| over |e| at v_old: v+ has gone 2q - 1 of the way, v- as far the other way.
        let (by_toward, by_back) = (2.0 * (1.0 - q), 2.0 * q);
        let held =
            toward.iter().zip(&back).map(|(t, b)| q * by_toward * t + (1.0 - q) * by_back * b);
        let largest = toward.iter().fold(0f64, |m, g| m.max(g.abs()));
        assert!(
            held.into_iter().all(|g| g.abs() < 1e-5 * largest),
            "the minimum on {}",
            compute.name
        );
    }
}

/// METHOD2 9.9: AWM's gradient, with g = 1/4.
#[test]
fn awm_weighs_its_regression_by_the_size_of_the_error() {
    let now = draw(3);
    let off: Vec<f64> = now.iter().zip(wanted()).map(|(v, w)| v - w).collect();
    let m = mean(off.iter().map(|d| d * d)) + 1e-10;
    let awm = ForwardObjective::Awm { clip_range: 1.0 };
    for compute in [cpu(), gpu()] {
        for advantage in [2.0f32, -5.0] {
            // A policy that is its own old one: no pull towards that.
            let gradient = found(&compute, awm, [&now, &now], advantage).0;
            let share = f64::from(advantage) / 5.0;
            let factor = 2.0 * share * T * m.powf(-0.75) / DIM as f64;
            let expected: Vec<f64> = off.iter().map(|d| factor * d).collect();
            close(&gradient, &expected, 2e-5, &format!("A {advantage}"));
        }
    }
}

/// The loss that is recorded is the one whose gradient is taken, where nothing is held constant: of
/// AWM with its pull.
#[test]
fn the_gradient_is_that_of_the_loss() {
    let (now, old) = (draw(3), draw(4));
    let awm = ForwardObjective::Awm { clip_range: 1.0 };
    let wanted = wanted();
    // AWM's own part of the loss is -A rho, whose rho is 1 in value: log pi is what moves.
    let loss = |v: &[f64]| {
        let m = mean(v.iter().zip(&wanted).map(|(v, w)| (v - w).powi(2))) + 1e-10;
        let log = -(m.powf(0.25) - 1e-10f64.powf(0.25)) * 4.0 * T;
        -0.4 * log + mean(v.iter().zip(&old).map(|(v, o)| (v - o).powi(2)))
    };
    let gradient = found(&cpu(), awm, [&now, &old], 2.0).0;
    let difference = |i: usize| {
        let at = |by: f64| {
            let mut v = now.clone();
            v[i] += by;
            loss(&v)
        };
        (at(1e-4) - at(-1e-4)) / 2e-4
    };
    let expected: Vec<f64> = (0..DIM).map(difference).collect();
    close(&gradient, &expected, 2e-5, "awm with its pull");
}

/// A dump of an update of the forward process.
struct Case {
    name: &'static str,
    model: std::path::PathBuf,
    objective: fn(&Dump) -> ForwardObjective,
    sampler: Sampler,
    steps: usize,
    guidance: f64,
}

fn number(dump: &Dump, name: &str) -> f32 {
    dump.metadata(name).parse().unwrap()
}

/// The gradient of a dump's update here.
fn replay(case: &Case, compute: &Compute, rows_at_once: Option<usize>) -> Gradients {
    let dump = Dump::open(case.name);
    let model = files(&case.model);
    let family = model.family;
    let net = model.load_network(&compute.burn, Storage::F32, None).unwrap();
    let adapter = |prefix: &str| dump.adapter(prefix, family.network(), &net.linears());
    let (own, old) = (adapter("lora."), adapter("old.").to_device(&compute.burn));
    let sampled = dump.metadata("objective") == "awm";
    let sampled = sampled.then(|| adapter("sampled.").to_device(&compute.burn));
    let lora = own.to_device(&compute.burn);
    let sampling = Sampling {
        sampler: case.sampler,
        steps: case.steps,
        eta: case.sampler.default_eta(),
        grid: Grid::Shifted,
        shift: None,
        tokens: 16,
    };
    let all = files(&case.model).schedule().unwrap().steps(&sampling).unwrap();
    let trained: Vec<Step> = dump
        .values("timesteps")
        .iter()
        .map(|t| *all.iter().find(|s| (s.t - f64::from(*t)).abs() < 1e-3).unwrap())
        .collect();
    let shape = dump.file.shape("x0").unwrap().to_vec();
    let n = shape[0];
    let weights = dump.values("row_weights");
    let of_image = |image: usize| -> Vec<usize> {
        (0..trained.len()).filter(|at| weights[at * n + image] > 0.0).collect()
    };
    let times: Vec<Vec<usize>> = (0..n).map(of_image).collect();
    let prompts = PromptPair {
        cond: dump.conditioning(compute, "", 0, n),
        uncond: dump.conditioning(compute, "negative_", 0, n),
    };
    let batch = TrajectoryBatch {
        part: Part::of_images(0, Batch { rows: 0..n, device: 0 }, trained.len()),
        noise: Noise {
            seed: dump.metadata("seed").parse().unwrap(),
            first_image: dump.metadata("first_image").parse().unwrap(),
        },
        latent: [shape[1], shape[2], shape[3]],
        transitions: Vec::new(),
        ends: dump.values("x0"),
    };
    let surrogate = ForwardSurrogate {
        objective: (case.objective)(&dump),
        clamp: number(&dump, "advantage_clamp"),
        kl_beta: number(&dump, "kl_beta"),
        scale: 1.0 / number(&dump, "entries"),
    };
    let guidance = GuidanceMode::new(&*net, case.guidance);
    let policy = Policy { compute, net: &*net, lora: Some(&lora), guidance, prompts: &prompts };
    let options = ForwardOptions {
        surrogate: &surrogate,
        guidance_gradient: GuidanceGradient::Both,
        advantage: &dump.values("advantages"),
        times: &times,
        pass: 0,
        old: &old,
        sampled: sampled.as_ref(),
        rows_at_once,
        test: false,
    };
    let mut sum = UpdateGradient::default();
    sum.add(forward_gradient(&policy, &own, &batch, &trained, &options, &|| {}).unwrap());
    let mut gradient = own.clone();
    gradient.parameters_mut().zip(sum.gradients).for_each(|(p, g)| *p = g);
    tensors(&gradient, Format::Diffusers, family.network())
}

#[test]
fn gradients_of_the_forward_process_are_those_of_pytorch() {
    let cases = [
        Case {
            name: "sd3-nft",
            model: golden("sd3"),
            objective: |dump| ForwardObjective::Nft { beta: number(dump, "nft_beta") },
            sampler: Sampler::FlowGrpo,
            steps: 6,
            guidance: 4.5,
        },
        Case {
            name: "awm",
            model: emoji(),
            objective: |dump| ForwardObjective::Awm { clip_range: number(dump, "clip_range") },
            sampler: Sampler::Ddim,
            steps: 8,
            guidance: 3.0,
        },
    ];
    for case in &cases {
        for (compute, rows) in [(cpu(), None), (cpu(), Some(3)), (gpu(), Some(3))] {
            let found: Vec<HostTensor> = replay(case, &compute, rows);
            let worst = worst(case.name, &found, torch(case.name));
            println!("{} on {}, {rows:?} rows: {worst:.1e}", case.name, compute.name);
            assert!(worst < 1e-4, "{} on {}, {rows:?}: {worst:e}", case.name, compute.name);
        }
    }
}
