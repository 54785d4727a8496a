// max(0, xi |A| - A log rho)

fn objective(log_rho: f32, advantage: f32) -> Entry {
    let h = params.clip_range * abs(advantage) - advantage * log_rho;
    return Entry(max(h, 0.0), select(0.0, -advantage, h > 0.0), select(0.0, 1.0, h < 0.0));
}
