// DDIM's mean, a x - b p, and the correction where the scheduler clips x0.

fn step_mean(x: Lanes, p: Lanes) -> Lanes {
    var mean = params.a * x - params.b * p;
    if params.clip < 1e30 {
        let x0 = params.x0_x * x - params.x0_p * p;
        mean += params.root_prev * (clamp(x0, Lanes(-params.clip), Lanes(params.clip)) - x0);
    }
    return mean;
}
