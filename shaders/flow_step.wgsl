// The mean of a flow's step, SDE or ODE: linear in the velocity. Its two numbers are made in f64
// (schedule/flow.rs).

fn step_mean(x: Lanes, v: Lanes) -> Lanes { return params.a * x - params.b * v; }
