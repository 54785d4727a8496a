// What an objective says of one (sample, step) pair. Kept in sync with Entry in
// src/ops/policy_objective.rs.

struct Entry {
    loss: f32,
    // d loss / d log rho
    slope: f32,
    clipped: f32,
}
