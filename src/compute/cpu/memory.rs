//! Large arrays in huge pages, and memory that is reused for repeated copies.
//!
//! Huge pages save address translations in loops over several arrays.
//!
//! The first write to fresh memory costs several times as much as the copy itself, because the system clears each page.
//! Memory that is kept and marked as free (`MADV_FREE`) is reused at the speed of a copy. If another process needs it,
//! the system takes its pages and returns cleared ones at the next write.

use bytemuck::Pod;
use rayon::prelude::*;

use super::CHUNK;
use crate::fs::{release_pages, use_large_pages};

/// Returns zeros that no thread has touched yet, so that no page is in memory.
pub(crate) fn zeros<T: Pod>(len: usize) -> Vec<T> {
    let mut zeros = bytemuck::zeroed_vec(len);
    use_large_pages(&mut zeros);
    zeros
}

/// Memory for a number of elements, which holds no values.
#[derive(Debug)]
pub struct Spare<T>(Vec<T>);

impl<T: Pod> Spare<T> {
    /// Allocates memory for `len` elements. Returns none if the system has too little.
    pub fn new(len: usize) -> Option<Spare<T>> {
        let mut memory = bytemuck::allocation::try_zeroed_vec(len).ok()?;
        use_large_pages(&mut memory);
        Some(Spare(memory))
    }

    /// Touches every page once with all threads, so that the first use is as fast as the later ones.
    pub fn prefault(mut self) -> Spare<T>
    where
        T: Send,
    {
        self.0.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(T::zeroed()));
        Spare::release(self.0)
    }

    /// Keeps memory whose values are no longer needed. The system may take its pages until it is used again.
    pub fn release(mut memory: Vec<T>) -> Spare<T> {
        release_pages(&mut memory);
        Spare(memory)
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the memory is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Uses the memory. `write` sets every element that is read later; the others are zero or keep an older value.
    pub fn fill_with(mut self, write: impl FnOnce(&mut [T])) -> Vec<T> {
        write(&mut self.0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_memory_holds_next_values() {
        for len in [0, 1, 1000, (1 << 20) + 13, (3 << 20) + 1] {
            let value = |round: usize, i: usize| (round * 7 + i) as u32;
            let mut spare = Spare::<u32>::new(len).unwrap().prefault();
            assert_eq!((spare.len(), spare.is_empty()), (len, len == 0));
            for round in 0..3 {
                let memory = spare.fill_with(|memory| (0..len).for_each(|i| memory[i] = value(round, i)));
                assert!(memory.iter().enumerate().all(|(i, &v)| v == value(round, i)), "{len}, round {round}");
                spare = Spare::release(memory);
            }
        }
    }

    #[test]
    fn zeros_are_zero_and_writable() {
        for len in [0, 1, (1 << 18) - 1, 1 << 18, (4 << 20) + 77] {
            let mut array: Vec<f32> = zeros(len);
            assert!(array.len() == len && array.iter().all(|&x| x == 0.0));
            array.fill(1.5);
            assert!(array.iter().all(|&x| x == 1.5));
        }
    }

    #[test]
    fn allocation_beyond_memory_returns_none() {
        assert!(Spare::<f32>::new(usize::MAX / 8).is_none());
    }
}
