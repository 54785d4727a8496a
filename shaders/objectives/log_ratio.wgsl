// max(-A (1 + log rho), -A clip(1 + log rho, 1 - xi, 1 + xi))

fn objective(log_rho: f32, advantage: f32) -> Entry {
    let xi = params.clip_range;
    let above = log_rho > params.log_hi;
    let below = log_rho < params.log_lo;
    let clipped = select(0.0, 1.0, above || below);
    if advantage > 0.0 && above { return Entry(-advantage * (1.0 + xi), 0.0, clipped); }
    if advantage < 0.0 && below { return Entry(-advantage * (1.0 - xi), 0.0, clipped); }
    return Entry(-advantage * (1.0 + log_rho), -advantage, clipped);
}
