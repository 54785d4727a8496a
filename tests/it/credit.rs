//! Schedules and credit rules against the f64 golden numbers of the method.

use pcpo_wgpu::schedule::credit::{Credit, apply, proportionate, zeta};
use pcpo_wgpu::schedule::flow::Spacing;
use pcpo_wgpu::schedule::{Ddim, Flow, Grid, Sampler, Sampling, Schedule, Step, StepKind};
use serde_json::Value;

fn golden() -> Vec<Value> {
    let text = include_str!("../golden/credit_weights.json");
    let all: Value = serde_json::from_str(text).unwrap();
    all.as_array().unwrap().iter().filter(|g| g["kind"] == "ddim-scaled-linear").cloned().collect()
}

fn close(found: f64, expected: &Value, what: &str) {
    let expected = expected.as_f64().unwrap();
    assert!(
        (found - expected).abs() <= 1e-10 * expected.abs().max(1e-3),
        "{what}: {found} is not {expected}"
    );
}

fn mean_native(steps: &[Step]) -> f64 {
    zeta(steps) / steps.len() as f64
}

#[test]
fn native_weights_match_the_golden_numbers() {
    let schedule = Ddim::stable_diffusion();
    let tables = golden();
    assert_eq!(tables.len(), 2);
    for table in tables {
        let n = table["steps"].as_u64().unwrap() as usize;
        let steps = schedule.steps(n, 1.0).unwrap();
        let rows = table["rows"].as_array().unwrap();
        assert_eq!(steps.len(), rows.len());
        for (step, row) in steps.iter().zip(rows) {
            assert_eq!(step.t as u64, row["t"].as_u64().unwrap());
            let StepKind::Diffusion { alpha_bar, .. } = step.kind else {
                panic!("a diffusion step")
            };
            close(alpha_bar, &row["alpha_bar"], "alpha_bar");
            close(step.sigma, &row["sigma_ddpm"], "sigma");
            close(step.w_native, &row["w_native"], "w_native");
            close(
                step.b,
                &Value::from(row["c1"].as_f64().unwrap() - row["c2_ddpm"].as_f64().unwrap()),
                "c1 - c2",
            );
        }
        close(mean_native(&steps), &table["mean_w_native"], "the mean weight");
    }
}

/// The papers turn v into eps first; the kernels work in units of the prediction. It is one and the
/// same step.
#[test]
fn a_step_in_v_is_the_step_in_eps() {
    let json = |prediction: &str| {
        serde_json::json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
            "prediction_type": prediction,
        })
    };
    let steps = |prediction| {
        let schedule = Ddim::from_config(&json(prediction)).unwrap();
        let native = schedule.steps(20, 1.0).unwrap();
        apply(Credit::Proportionate, &Schedule::Ddim(schedule), native, None).unwrap()
    };
    let (x, v, v_old, z) = (0.7f64, -0.4f64, -0.41f64, 1.3f64);
    for (e, p) in steps("epsilon").iter().zip(&steps("v_prediction")) {
        let StepKind::Diffusion { alpha_bar: bar, .. } = e.kind else { panic!("a diffusion step") };
        let eps = |v: f64| bar.sqrt() * v + (1.0 - bar).sqrt() * x;
        let (in_eps, in_v) = (e.a * x - e.b * eps(v), p.a * x - p.b * v);
        assert!((in_eps - in_v).abs() < 1e-12, "the mean at {}: {in_eps} and {in_v}", e.t);
        assert_eq!((e.sigma, e.weight), (p.sigma, p.weight));
        let log_rho = |w: f64, d: f64| -(w * d * z + 0.5 * (w * d).powi(2));
        let of_v = f64::from(pcpo_wgpu::ops::Coefficients::from(p).w);
        let (a, b) = (log_rho(e.weight, eps(v) - eps(v_old)), log_rho(of_v, v - v_old));
        assert!((a - b).abs() < 1e-6 * a.abs(), "log rho at {}: {a} and {b}", e.t);
    }
}

#[test]
fn proportionate_credit_is_the_native_mean_at_any_number_of_steps() {
    let schedule = Ddim::stable_diffusion();
    for n in [7, 10, 20, 50, 333] {
        let native = schedule.steps(n, 1.0).unwrap();
        let mean = mean_native(&native);
        let steps =
            apply(Credit::Proportionate, &Schedule::Ddim(schedule.clone()), native.clone(), None)
                .unwrap();
        for (p, s) in steps.iter().zip(&native) {
            assert!((p.weight - mean).abs() < 1e-12 * mean);
            assert_eq!((p.sigma, p.w_native), (s.sigma, s.w_native));
        }
    }
}

#[test]
fn released_credit_has_the_published_sampler_and_constant_at_50_steps_only() {
    let schedule = Ddim::stable_diffusion();
    let table = &golden()[0];
    let steps = apply(
        Credit::Released,
        &Schedule::Ddim(schedule.clone()),
        schedule.steps(50, 1.0).unwrap(),
        None,
    )
    .unwrap();
    for (step, row) in steps.iter().zip(table["rows"].as_array().unwrap()) {
        close(step.sigma, &row["sigma_released"], "sigma_released");
        close(step.w_native, &row["w_released_true"], "the sampler's true weight");
        assert!((step.weight - 0.516_899_7).abs() < 1e-6);
    }
    let error = apply(
        Credit::Released,
        &Schedule::Ddim(schedule.clone()),
        schedule.steps(20, 1.0).unwrap(),
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("proportionate"), "{error}");
}

#[test]
fn a_step_without_noise_is_not_trained() {
    let schedule = Ddim::stable_diffusion();
    assert!(schedule.steps(10, 0.0).unwrap().iter().all(|s| !s.trainable()));
    assert!(schedule.steps(10, 1.0).unwrap().iter().all(|s| s.trainable()));
}

fn flow_tables() -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("../golden/credit_weights.json")).unwrap();
    all.as_array()
        .unwrap()
        .iter()
        .filter(|g| g["kind"].as_str().unwrap().starts_with("flow-"))
        .cloned()
        .collect()
}

fn flow_sampling(sampler: Sampler, steps: usize, eta: f64, shift: f64) -> Sampling {
    Sampling { sampler, steps, eta, grid: Grid::Shifted, shift: Some(shift), tokens: 0 }
}

#[test]
fn flow_steps_and_their_credit_match_the_golden_numbers() {
    let schedule = Schedule::Flow(Flow::shifted(1.0));
    let tables = flow_tables();
    assert_eq!(tables.len(), 3);
    for table in tables {
        let sampler =
            if table["kind"] == "flow-dance" { Sampler::Dance } else { Sampler::FlowGrpo };
        let number = |name: &str| table[name].as_f64().unwrap();
        let n = table["steps"].as_u64().unwrap() as usize;
        let native =
            schedule.steps(&flow_sampling(sampler, n, number("eta"), number("shift"))).unwrap();
        close(zeta(&native), &table["zeta"], "zeta");
        let steps = apply(Credit::Proportionate, &schedule, native, None).unwrap();
        for (step, row) in steps.iter().zip(table["rows"].as_array().unwrap()) {
            let StepKind::Flow { t, dt } = step.kind else { panic!("a flow step") };
            close(t, &row["t"], "t");
            close(
                step.t,
                &Value::from(1000.0 * row["t"].as_f64().unwrap()),
                "the network's timestep",
            );
            close(dt, &row["dt"], "dt");
            close(step.sigma / dt.sqrt(), &row["sigma"], "sigma");
            close(step.w_native, &row["w_native"], "w_native");
            close(step.w_total, &row["w_in_zeta"], "w_in_zeta");
            close(step.weight, &row["w_proportionate"], "w_proportionate");
        }
    }
}

#[test]
fn published_zetas() {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let zeta_of =
        |sampler, n, eta| zeta(&schedule.steps(&flow_sampling(sampler, n, eta, 3.0)).unwrap());
    // PCPO gives 13.343 for DanceGRPO and 4.315 for Flow-GRPO.
    assert!((zeta_of(Sampler::Dance, 16, 0.3) - 13.343190914766362).abs() < 1e-10);
    assert!((zeta_of(Sampler::FlowGrpo, 10, 0.7) - 4.3152134639895925).abs() < 1e-10);
}

#[test]
fn a_published_zeta_takes_the_place_of_the_grid_s_and_needs_proportionate_credit() {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let native = schedule.steps(&flow_sampling(Sampler::Dance, 8, 0.3, 3.0)).unwrap();
    let steps = apply(Credit::Proportionate, &schedule, native.clone(), Some(13.343)).unwrap();
    assert!(steps.iter().all(|s| (s.weight - 13.343 * s.share).abs() < 1e-12));
    let total: f64 = steps.iter().map(|s| s.weight).sum();
    assert!((total - 13.343).abs() < 1e-9, "the intervals add up to 1");
    let error = apply(Credit::Native, &schedule, native, Some(1.0)).unwrap_err().to_string();
    assert!(error.contains("--zeta") && error.contains("proportionate"), "{error}");
}

#[test]
fn credit_over_the_trained_steps_keeps_their_total() {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let native = schedule.steps(&flow_sampling(Sampler::FlowGrpo, 10, 0.7, 3.0)).unwrap();
    let mut trained: Vec<Step> = native[2..5].to_vec();
    let total = zeta(&trained);
    proportionate(&mut trained, total);
    let sum = |f: fn(&Step) -> f64, steps: &[Step]| steps.iter().map(f).sum::<f64>();
    assert!((sum(|s| s.weight, &trained) - sum(|s| s.w_native, &native[2..5])).abs() < 1e-12);
    assert!(
        (trained[0].weight / trained[1].weight - trained[0].share / trained[1].share).abs() < 1e-12
    );
}

/// diffusers' own grids (tests/golden/make_schedule_golden.py): SD3's, which shifts twice, FLUX's
/// with dynamic shifting, and the linear kind of it.
#[test]
fn grids_match_diffusers_scheduler() {
    let all: Value = serde_json::from_str(include_str!("../golden/flow_grids.json")).unwrap();
    let all = all.as_array().unwrap();
    assert!(all.len() >= 12);
    for entry in all {
        let mut flow = Flow::from_config(&entry["config"]).unwrap();
        if entry["pipeline"] == "flux" {
            flow.spacing = Spacing::Pipeline;
        }
        let steps = entry["steps"].as_u64().unwrap() as usize;
        let tokens = entry["image_seq_len"].as_u64().unwrap_or(0) as usize;
        let sampling = Sampling {
            sampler: Sampler::Ode,
            steps,
            eta: 0.0,
            grid: Grid::Diffusers,
            shift: None,
            tokens,
        };
        let times = flow.times(&sampling).unwrap();
        let expected = entry["sigmas"].as_array().unwrap();
        assert_eq!(times.len(), expected.len(), "{}", entry["name"]);
        for (t, e) in times.iter().zip(expected) {
            // The scheduler's numbers are f32.
            assert!((t - e.as_f64().unwrap()).abs() < 3e-7, "{}: {t} is not {e}", entry["name"]);
        }
        let network = flow.steps(&sampling).unwrap();
        for (step, e) in network.iter().zip(entry["timesteps"].as_array().unwrap()) {
            assert!(
                (step.t - e.as_f64().unwrap()).abs() < 3e-4,
                "{}: timestep {} is not {e}",
                entry["name"],
                step.t
            );
        }
    }
}

#[test]
fn flow_samplers_lead_to_the_ode_as_noise_goes_to_zero() {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    for sampler in [Sampler::Dance, Sampler::FlowGrpo, Sampler::Cps] {
        let quiet = schedule.steps(&flow_sampling(sampler, 10, 1e-6, 3.0)).unwrap();
        let ode = schedule.steps(&flow_sampling(Sampler::Ode, 10, 0.0, 3.0)).unwrap();
        for (q, o) in quiet.iter().zip(&ode) {
            assert!((q.a - o.a).abs() < 1e-9 && (q.b - o.b).abs() < 1e-9, "{sampler:?} at {}", q.t);
            assert_eq!((o.a, o.sigma, o.trainable()), (1.0, 0.0, false));
            assert_eq!(q.without_noise().b, o.b);
        }
    }
    // METHOD2 9.6.
    let published = schedule.steps(&flow_sampling(Sampler::Cps, 10, 0.8, 3.0)).unwrap();
    let weights = [
        0.03894305, 0.07288823, 0.11366054, 0.16383603, 0.22768612, 0.31306841, 0.43689607,
        0.6464443, 1.1662116,
    ];
    for (step, w) in published.iter().zip(weights) {
        assert!((step.w_native - w).abs() < 1e-7, "{} at {}, not {w}", step.w_native, step.t);
    }
    for (i, credit) in [(0, 0.06550644), (5, 0.25170937), (8, 0.13185604)] {
        let found = 2.0 * published[i].sigma.powi(2) * published[i].w_native;
        assert!((found - credit).abs() < 1e-7, "{found}, not {credit}");
    }
    // CPS has no noise in its last step, so that step is never trained.
    let cps = schedule.steps(&flow_sampling(Sampler::Cps, 10, 0.7, 3.0)).unwrap();
    assert!(cps[..9].iter().all(Step::trainable) && !cps[9].trainable());
}

#[test]
fn a_sampler_of_the_other_family_is_refused() {
    let flow = Schedule::Flow(Flow::shifted(3.0));
    let ddim = Schedule::Ddim(Ddim::stable_diffusion());
    let sampling = |sampler| Sampling {
        sampler,
        steps: 10,
        eta: 0.5,
        grid: Grid::Shifted,
        shift: None,
        tokens: 0,
    };
    assert!(
        flow.steps(&sampling(Sampler::Ddim)).unwrap_err().to_string().contains("--sampler ddim")
    );
    assert!(
        ddim.steps(&sampling(Sampler::Dance)).unwrap_err().to_string().contains("--sampler dance")
    );
}

/// The reweighting matrix of Reward Score Matching on Flow-GRPO's own grid: the spread of each
/// rule's first-order credit over the trained steps, and where entries clip in terms of log rho.
#[test]
fn reward_score_matching_s_rules_have_their_credit_and_clip_where_they_should() {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let (sampler, shift) = (Sampler::FlowGrpo, None);
    let sampling = Sampling { sampler, steps: 10, eta: 0.7, grid: Grid::Shifted, shift, tokens: 0 };
    let native = schedule.steps(&sampling).unwrap();
    let sigma = [
        0.7, 0.73837139, 0.53168817, 0.44145936, 0.3877382, 0.35, 0.31950483, 0.29047375,
        0.25617377,
    ];
    for (i, (step, sigma)) in native.iter().zip(sigma).enumerate() {
        assert!((step.sigma - sigma).abs() < 1e-8, "step {i}: sigma {}", step.sigma);
        let kappa = step.w_native * step.sigma / step.share;
        let expected = if i == 0 { 1.0 } else { 1.245 };
        assert!((kappa - expected).abs() < 1e-9, "step {i}: kappa / dt is {kappa}");
    }
    // Credit is the loss's factor times the weight in log rho.
    for (rule, spread, first, last) in [
        (Credit::Native, 17.0099, 1e-4, 1e-4),
        (Credit::Proportionate, 5.0, 3.311e-5, 1.1262e-4),
        (Credit::Tempflow, 6.225, 1e-4, 1e-4),
        (Credit::TempflowRatio, 6.225, f64::NAN, f64::NAN),
        (Credit::Guard, 1.245, 1.4286e-4, 3.9036e-4),
        (Credit::Fairclip, 17.0099, 2.0408e-4, 1.5238e-3),
        (Credit::Fairclip2, 1.245, 2.0408e-4, 1.5238e-3),
    ] {
        let steps = apply(rule, &schedule, native.clone(), None).unwrap();
        let credit: Vec<f64> = steps[..9].iter().map(|s| s.loss_weight * s.weight).collect();
        let largest = credit.iter().copied().fold(0.0, f64::max);
        let smallest = credit.iter().copied().fold(f64::INFINITY, f64::min);
        let found = largest / smallest;
        assert!((found / spread - 1.0).abs() < 1e-4, "{rule:?}: a spread of {found}");
        // u = weight / native log rho to first order: u is xi where log rho is xi native / weight.
        for (step, expected) in [(&steps[0], first), (&steps[8], last)] {
            let at = 1e-4 * step.w_native / step.weight;
            let near = expected.is_nan() || (at / expected - 1.0).abs() < 2e-4;
            assert!(near, "{rule:?} at {}: clips at {at:e}", step.t);
        }
        // The quadratic term is that of the native ratio, times what log rho is multiplied by.
        if matches!(rule, Credit::Fairclip | Credit::Fairclip2 | Credit::TempflowRatio) {
            for (step, own) in steps[..9].iter().zip(&native) {
                let factor = step.weight / own.w_native;
                let quadratic = step.quadratic * step.weight * step.weight;
                let expected = factor * own.w_native * own.w_native;
                assert!((quadratic / expected - 1.0).abs() < 1e-12, "{rule:?} at {}", step.t);
            }
        }
        assert!(steps[9].weight.is_finite() && steps[9].loss_weight.is_finite());
    }
    let tempflow = apply(Credit::Tempflow, &schedule, native.clone(), None).unwrap();
    let mean = tempflow[..9].iter().map(|s| s.loss_weight).sum::<f64>() / 9.0;
    assert!((mean - 1.00385).abs() < 1e-5, "the mean of 2.25 sigma is {mean}");
    for step in &tempflow[1..9] {
        let credit = step.loss_weight * step.weight / step.share;
        assert!((credit - 2.80125).abs() < 1e-9, "{credit}");
    }
}
