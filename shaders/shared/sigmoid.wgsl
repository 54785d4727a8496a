// 1 / (1 + exp(-z)), by the exponential of a negative number: nothing overflows.

fn sigmoid(z: Lanes) -> Lanes {
    let e = exp(-abs(z));
    return select(e, Lanes(1.0), z >= Lanes()) / (1.0 + e);
}
