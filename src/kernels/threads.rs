//! Work of the kernels' CPU paths, dealt out to the threads of the pool that they run in, and a
//! thread's memory.

use rayon::prelude::*;

/// Runs `work` over parts of `out` of a size, each with its number: on all threads of the pool
/// where there are several and the parts are worth it.
pub fn parts(out: &mut [f32], size: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if rayon::current_num_threads() > 1 && out.len() > 1 << 14 {
        out.par_chunks_mut(size).enumerate().for_each(|(i, part)| work(i, part));
    } else {
        out.chunks_mut(size).enumerate().for_each(|(i, part)| work(i, part));
    }
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Lends `work` memory of this thread for `n` numbers, of which none is known: fresh memory would
/// be cleared by the system at each call.
pub fn scratch<R>(n: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut own = SCRATCH.take();
    own.resize(own.len().max(n), 0.0);
    let result = work(&mut own[..n]);
    SCRATCH.set(own);
    result
}
