//! Schedules and credit rules against the f64 golden numbers of the method.

use pcpo_wgpu::credit::{Credit, apply, mean_native};
use pcpo_wgpu::schedule::Schedule;
use serde_json::Value;

fn golden() -> Vec<Value> {
    let text = include_str!("../golden/credit_weights.json");
    let all: Value = serde_json::from_str(text).unwrap();
    all.as_array().unwrap().iter().filter(|g| g["kind"] == "ddim-scaled-linear").cloned().collect()
}

fn close(found: f64, expected: &Value, what: &str) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() <= 1e-10 * expected.abs().max(1e-3), "{what}: {found} is not {expected}");
}

#[test]
fn native_weights_match_the_golden_numbers() {
    let schedule = Schedule::stable_diffusion();
    let tables = golden();
    assert_eq!(tables.len(), 2);
    for table in tables {
        let n = table["steps"].as_u64().unwrap() as usize;
        let steps = schedule.steps(n, 1.0).unwrap();
        let rows = table["rows"].as_array().unwrap();
        assert_eq!(steps.len(), rows.len());
        for (step, row) in steps.iter().zip(rows) {
            assert_eq!(step.t as u64, row["t"].as_u64().unwrap());
            close(step.alpha_bar, &row["alpha_bar"], "alpha_bar");
            close(step.sigma, &row["sigma_ddpm"], "sigma");
            close(step.w_native, &row["w_native"], "w_native");
            close(step.b, &Value::from(row["c1"].as_f64().unwrap() - row["c2_ddpm"].as_f64().unwrap()), "c1 - c2");
        }
        close(mean_native(&steps), &table["mean_w_native"], "the mean weight");
    }
}

#[test]
fn proportionate_credit_is_the_native_mean_at_any_number_of_steps() {
    let schedule = Schedule::stable_diffusion();
    for n in [7, 10, 20, 50, 333] {
        let native = schedule.steps(n, 1.0).unwrap();
        let mean = mean_native(&native);
        let steps = apply(Credit::Proportionate, &schedule, native.clone()).unwrap();
        for (p, s) in steps.iter().zip(&native) {
            assert_eq!((p.weight, p.sigma, p.w_native), (mean, s.sigma, s.w_native));
        }
    }
}

#[test]
fn released_credit_has_the_published_sampler_and_constant_at_50_steps_only() {
    let schedule = Schedule::stable_diffusion();
    let table = &golden()[0];
    let steps = apply(Credit::Released, &schedule, schedule.steps(50, 1.0).unwrap()).unwrap();
    for (step, row) in steps.iter().zip(table["rows"].as_array().unwrap()) {
        close(step.sigma, &row["sigma_released"], "sigma_released");
        close(step.w_native, &row["w_released_true"], "the sampler's true weight");
        assert!((step.weight - 0.516_899_7).abs() < 1e-6);
    }
    let error = apply(Credit::Released, &schedule, schedule.steps(20, 1.0).unwrap()).unwrap_err();
    assert!(error.to_string().contains("proportionate"), "{error}");
}

#[test]
fn a_step_without_noise_is_not_trained() {
    let schedule = Schedule::stable_diffusion();
    assert!(schedule.steps(10, 0.0).unwrap().iter().all(|s| !s.trainable()));
    assert!(schedule.steps(10, 1.0).unwrap().iter().all(|s| s.trainable()));
}
