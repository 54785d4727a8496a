//! A tensor's values put in row-major order on the CPU, where they lie in another: after a
//! permutation, a slice, or one value for many.

use super::threads::parts;

/// An axis: its size, and how far apart its elements lie.
#[derive(Clone, Copy)]
struct Axis {
    size: usize,
    from: isize,
    to: usize,
}

/// Elements of an axis that are copied together, so that what is read and what is written both stay
/// in a cache.
const TILE: usize = 16;

/// The values at `start` plus multiples of `strides`, in row-major order of `shape`.
pub fn row_major(from: &[f32], shape: &[usize], strides: &[isize], start: usize) -> Vec<f32> {
    let mut out = vec![0.0; shape.iter().product()];
    let axes = axes(shape, strides);
    let Some(&first) = axes.first().filter(|_| !out.is_empty()) else {
        out.iter_mut().for_each(|to| *to = from[start]);
        return out;
    };
    // The first axis is dealt out to threads.
    let part = TILE * first.to;
    parts(&mut out, part, |i, out| {
        let mut axes = axes.clone();
        axes[0].size = out.len() / first.to;
        copy(from, start as isize + (i * TILE) as isize * first.from, &axes, out);
    });
    out
}

/// The axes of more than one element; neighbours that are walked like one are one.
fn axes(shape: &[usize], strides: &[isize]) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::new();
    let mut to = 1;
    for (&size, &from) in shape.iter().zip(strides).rev().filter(|(size, _)| **size != 1) {
        match axes.last_mut() {
            Some(inner) if from == inner.from * inner.size as isize => inner.size *= size,
            _ => axes.push(Axis { size, from, to }),
        }
        to *= size;
    }
    axes.reverse();
    axes
}

/// Copies a block of axes, of which the last is written without gaps.
fn copy(from: &[f32], start: isize, axes: &[Axis], out: &mut [f32]) {
    let (last, outer) = axes.split_last().expect("a block has an axis");
    if last.from == 1 || outer.is_empty() {
        return each(outer, start, 0, &mut |at, to| {
            let row = &mut out[to..to + last.size];
            if last.from == 1 {
                row.copy_from_slice(&from[at as usize..][..last.size]);
            } else {
                let read = |i: usize| from[(at + i as isize * last.from) as usize];
                row.iter_mut().enumerate().for_each(|(i, to)| *to = read(i));
            }
        });
    }
    // What is read without gaps, or with the smallest, beside what is written without.
    let nearest = (0..outer.len()).min_by_key(|i| outer[*i].from.unsigned_abs());
    let mut outer = outer.to_vec();
    let beside = outer.remove(nearest.expect("there is an outer axis"));
    each(&outer, start, 0, &mut |at, to| {
        for rows in (0..beside.size).step_by(TILE) {
            for columns in (0..last.size).step_by(TILE) {
                let width = TILE.min(last.size - columns);
                for i in rows..beside.size.min(rows + TILE) {
                    let at = at + i as isize * beside.from + columns as isize * last.from;
                    let row = &mut out[to + i * beside.to + columns..][..width];
                    for (j, to) in row.iter_mut().enumerate() {
                        *to = from[(at + j as isize * last.from) as usize];
                    }
                }
            }
        }
    });
}

/// Calls `work` at every element of some axes, with its places.
fn each(axes: &[Axis], at: isize, to: usize, work: &mut dyn FnMut(isize, usize)) {
    let Some((axis, inner)) = axes.split_first() else { return work(at, to) };
    for i in 0..axis.size {
        each(inner, at + i as isize * axis.from, to + i * axis.to, work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_any_order_become_row_major() {
        let from: Vec<f32> = (0..40_000).map(|i| i as f32).collect();
        let cases: [(&[usize], &[isize], usize); 9] = [
            // A matrix, transposed; the same within images; channels last to channels first.
            (&[37, 53], &[1, 37], 0),
            (&[3, 37, 53], &[37 * 53, 1, 37], 0),
            (&[2, 16, 20, 30], &[9600, 1, 480, 16], 0),
            // A slice of rows; heads before tokens; one row for all; one value for all.
            (&[19, 8], &[24, 1], 5),
            (&[2, 4, 70, 16], &[4480, 16, 64, 1], 0),
            (&[7, 40], &[0, 1], 3),
            (&[5, 6], &[0, 0], 11),
            // Backwards; a single value.
            (&[4, 300], &[300, -1], 299),
            (&[1, 1], &[9, 9], 2),
        ];
        for (shape, strides, start) in cases {
            let n: usize = shape.iter().product();
            let expected = (0..n).map(|i| {
                let (mut rest, mut at) = (i, start as isize);
                for (size, stride) in shape.iter().zip(strides).rev() {
                    at += (rest % size) as isize * stride;
                    rest /= size;
                }
                from[at as usize]
            });
            let found = row_major(&from, shape, strides, start);
            assert_eq!(found, expected.collect::<Vec<f32>>(), "{shape:?} {strides:?}");
        }
        assert!(row_major(&from, &[0, 3], &[3, 1], 0).is_empty());
    }
}
