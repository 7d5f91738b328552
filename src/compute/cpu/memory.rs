//! Large arrays: in large pages, and, where copies are made now and then, lent back to the system while they hold nothing.
//!
//! A loop over several arrays looks up far fewer addresses in large pages than in small ones.
//!
//! Fresh memory costs several times what the copy into it costs, because the system clears it page by page as it is first
//! touched. Memory that is lent back is used again at the speed of a copy; where others need it, the system takes it,
//! and gives cleared pages when it is touched again.

use bytemuck::Pod;
use rayon::prelude::*;

use super::CHUNK;

/// Zeros that no thread has touched yet.
pub(crate) fn zeros<T: Pod>(len: usize) -> Vec<T> {
    let mut zeros = bytemuck::zeroed_vec(len);
    system::use_large_pages(&mut zeros);
    zeros
}

/// Memory for some elements, which holds nothing.
#[derive(Debug)]
pub struct Spare<T>(Vec<T>);

impl<T: Pod> Spare<T> {
    /// Takes memory for so many elements; none where the system has not enough.
    pub fn new(len: usize) -> Option<Spare<T>> {
        let mut memory = bytemuck::allocation::try_zeroed_vec(len).ok()?;
        system::use_large_pages(&mut memory);
        Some(Spare(memory))
    }

    /// Touches fresh memory with all threads, so that it costs what a copy costs when it is used, and lends it back.
    pub fn touched(mut self) -> Spare<T>
    where
        T: Send,
    {
        self.0.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(T::zeroed()));
        Spare::lend_back(self.0)
    }

    /// Lends memory back to the system until it is used again.
    pub fn lend_back(mut memory: Vec<T>) -> Spare<T> {
        system::lend_back(&mut memory);
        Spare(memory)
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Uses the memory: `write` sets every element that is read afterwards; the others may be zero or what they were.
    pub fn written(mut self, write: impl FnOnce(&mut [T])) -> Vec<T> {
        write(&mut self.0);
        self.0
    }
}

#[cfg(target_os = "linux")]
mod system {
    use bytemuck::Pod;
    use rustix::mm::{Advice, madvise};

    /// Smaller memory is not worth the call.
    const LARGE: usize = 1 << 20;

    /// No system has larger pages of the common kind.
    const PAGE: usize = 64 << 10;

    pub fn use_large_pages<T: Pod>(memory: &mut [T]) {
        if let Some((start, bytes)) = pages(memory) {
            // SAFETY: the range lies within memory that is borrowed mutably, and the advice changes no byte of it.
            let advised = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
            // A kernel without them has small pages, and all is as it was.
            let _ = advised;
        }
    }

    /// The elements may become zero at any time until they are written.
    pub fn lend_back<T: Pod>(memory: &mut [T]) {
        if let Some((start, bytes)) = pages(memory) {
            // SAFETY: the range lies within memory that is borrowed mutably. Its elements become zeros now or later,
            // which all bits of `T: Pod` may be; `Spare` lets nobody see them before they are written, and a page that
            // has been written keeps what it holds.
            let advised = unsafe { madvise(start, bytes, Advice::LinuxFree) };
            // Where the system does not take it, it stays.
            let _ = advised;
        }
    }

    /// The whole pages within some memory, where that is large.
    fn pages<T: Pod>(memory: &mut [T]) -> Option<(*mut std::ffi::c_void, usize)> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(memory);
        let before = bytes.as_ptr().align_offset(PAGE);
        let whole = bytes.len().checked_sub(before)? / PAGE * PAGE;
        let bytes = bytes.get_mut(before..before + whole).filter(|bytes| bytes.len() >= LARGE)?;
        Some((bytes.as_mut_ptr().cast(), bytes.len()))
    }
}

/// Elsewhere pages are what they are, and memory that is kept stays taken.
#[cfg(not(target_os = "linux"))]
mod system {
    pub fn use_large_pages<T>(_: &mut [T]) {}

    pub fn lend_back<T>(_: &mut [T]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_lent_back_holds_what_is_written_next() {
        for len in [0, 1, 1000, (1 << 20) + 13, (3 << 20) + 1] {
            let value = |round: usize, i: usize| (round * 7 + i) as u32;
            let mut spare = Spare::<u32>::new(len).unwrap().touched();
            assert_eq!((spare.len(), spare.is_empty()), (len, len == 0));
            for round in 0..3 {
                let memory = spare.written(|memory| (0..len).for_each(|i| memory[i] = value(round, i)));
                assert!(memory.iter().enumerate().all(|(i, &v)| v == value(round, i)), "{len}, round {round}");
                spare = Spare::lend_back(memory);
            }
        }
    }

    #[test]
    fn zeros_are_zeros_that_can_be_written() {
        for len in [0, 1, (1 << 18) - 1, 1 << 18, (4 << 20) + 77] {
            let mut array: Vec<f32> = zeros(len);
            assert!(array.len() == len && array.iter().all(|&x| x == 0.0));
            array.fill(1.5);
            assert!(array.iter().all(|&x| x == 1.5));
        }
    }

    #[test]
    fn more_than_there_is_is_told_and_not_fatal() {
        assert!(Spare::<f32>::new(usize::MAX / 8).is_none());
    }
}
