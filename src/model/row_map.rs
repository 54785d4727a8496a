//! Rows that are equal are computed once: which row of a few each row of many is.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::kernels::rows::rows_of;

/// For each of many rows, which of a few it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowMap {
    of: Vec<usize>,
    few: usize,
}

impl RowMap {
    /// `n` rows, each another.
    pub fn identity(n: usize) -> Self {
        Self { of: (0..n).collect(), few: n }
    }

    /// Equal items are one row; the few are in the order of their first item.
    pub fn of_equal<T: PartialEq>(items: &[T]) -> Self {
        let mut firsts: Vec<&T> = Vec::new();
        let of = items.iter().map(|item| {
            firsts.iter().position(|first| *first == item).unwrap_or_else(|| {
                firsts.push(item);
                firsts.len() - 1
            })
        });
        let of: Vec<usize> = of.collect();
        Self { few: firsts.len(), of }
    }

    /// Of each row the one of the few that it is.
    pub fn of(&self) -> &[usize] {
        &self.of
    }

    /// How many different rows there are.
    pub fn few(&self) -> usize {
        self.few
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.of.len()
    }

    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    fn is_identity(&self) -> bool {
        self.of.iter().copied().eq(0..self.few)
    }

    /// The first row of each of the few.
    pub fn firsts(&self) -> Vec<usize> {
        let first = |few: usize| self.of.iter().position(|&of| of == few);
        (0..self.few).filter_map(first).collect()
    }

    /// Some of the rows, in the order of `rows`.
    pub fn at(&self, rows: &[usize]) -> Self {
        Self { of: rows.iter().map(|&row| self.of[row]).collect(), few: self.few }
    }

    /// `n` rows from `start` on, with the range of the few that they need.
    pub fn narrow(&self, start: usize, n: usize) -> (Self, Range<usize>) {
        let of = &self.of[start..start + n];
        let first = of.iter().copied().min().unwrap_or(0);
        let end = of.iter().copied().max().map_or(0, |last| last + 1);
        let of = of.iter().map(|of| of - first).collect();
        (Self { of, few: end - first }, first..end)
    }

    /// These rows, and below them others of others.
    pub fn then(&self, other: &Self) -> Self {
        let below = other.of.iter().map(|of| of + self.few);
        Self { of: self.of.iter().copied().chain(below).collect(), few: self.few + other.few }
    }

    /// The few, `[few, ..]`, of all rows, `[len, ..]`.
    pub fn take<const D: usize>(&self, all: Tensor<D>) -> Tensor<D> {
        if self.is_identity() {
            return all;
        }
        rows_of(&all, &self.firsts())
    }

    /// All rows, `[len, ..]`, from the few, `[few, ..]`.
    pub fn spread<const D: usize>(&self, few: Tensor<D>) -> Tensor<D> {
        if self.is_identity() {
            return few;
        }
        rows_of(&few, &self.of)
    }

    /// What arrives at the few, `[few, ..]`, by what arrives at all rows: the gradient of
    /// [`Self::spread`].
    pub fn sum<const D: usize>(&self, all: Tensor<D>) -> Tensor<D> {
        if self.is_identity() {
            return all;
        }
        let sum = |few: usize| {
            let own = self.of.iter().enumerate().filter(|(_, of)| **of == few);
            let own = own.map(|(row, _)| all.clone().narrow(0, row, 1));
            own.reduce(|sum, row| sum + row).expect("each of the few is a row")
        };
        Tensor::cat((0..self.few).map(sum).collect(), 0)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::device::tensor::{host, upload};

    #[test]
    fn equal_rows_are_one_and_their_gradient_is_a_sum() {
        let map = RowMap::of_equal(&["b", "a", "b", "c", "a", "b"]);
        assert_eq!((map.of(), map.few()), (&[0, 1, 0, 2, 1, 0][..], 3));
        assert_eq!(map.firsts(), [0, 1, 3]);
        let all = upload(&[1.0, 2.0, 1.0, 3.0, 2.0, 1.0], [6, 1], &Device::flex());
        let few = map.take(all.clone());
        assert_eq!(host(&few), [1.0, 2.0, 3.0]);
        assert_eq!(host(&map.spread(few)), host(&all));
        assert_eq!(host(&map.sum(all)), [3.0, 4.0, 3.0]);
    }

    #[test]
    fn maps_are_cut_and_joined() {
        let map = RowMap::of_equal(&[5, 5, 6, 7, 7]);
        assert_eq!(map.narrow(2, 2), (RowMap::identity(2), 1..3));
        assert_eq!(map.narrow(3, 2), (RowMap::of_equal(&[0; 2]), 2..3));
        let both = RowMap::of_equal(&[0; 2]).then(&RowMap::identity(2));
        assert_eq!((both.of(), both.few()), (&[0, 0, 1, 2][..], 3));
        assert_eq!(both.at(&[0, 3]).of(), [0, 2]);
    }
}
