//! Loops that move bytes with all threads and do almost no arithmetic. They measure the machine's limit.
//!
//! They use the same chunks, vectors and prefetches as the loops that they are compared with.

use rayon::prelude::*;

use super::{prefetch, vectorised};

/// Bytes per task.
const CHUNK: usize = 1 << 18;

/// Bytes of each stream that are processed together: whole cache lines.
const TILE: usize = 1 << 8;

/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// Copies a stream: one is read, one is written.
pub fn copy(dst: &mut [f32], src: &[f32]) {
    let chunk = CHUNK / size_of::<f32>();
    dst.par_chunks_mut(chunk).zip(src.par_chunks(chunk)).for_each(|(dst, src)| dst.copy_from_slice(src));
}

/// Moves the bytes of an update: reads one stream `p` and updates the others in place, `x <- p - x`.
///
/// All streams have the same length.
pub fn update(updated: &mut [&mut [f32]], read: &[f32]) {
    let chunk = CHUNK / size_of::<f32>();
    let tile = TILE / size_of::<f32>();
    let chunks = split_streams(updated, chunk).into_par_iter().zip(read.par_chunks(chunk));
    chunks.for_each(|(mut updated, read)| {
        vectorised(
            #[inline(always)]
            || {
                for (i, read) in read.chunks(tile).enumerate() {
                    prefetch::for_reading(read);
                    for updated in &mut updated {
                        let updated = &mut updated[i * tile..][..read.len()];
                        prefetch::for_writing(updated);
                        updated.iter_mut().zip(read).for_each(|(x, p)| *x = p - *x);
                    }
                }
            },
        );
    });
}

/// Returns the wrapping sum of all little-endian words of streams that are only read.
///
/// Bytes after the last whole word of a chunk are ignored.
pub fn scan(streams: &[&[u8]]) -> u64 {
    let sum = |chunk: &[u8]| {
        vectorised(
            #[inline(always)]
            || words(chunk).fold(0, u64::wrapping_add),
        )
    };
    let chunks = streams.par_iter().flat_map(|stream| stream.par_chunks(CHUNK));
    chunks.map(sum).reduce(|| 0, u64::wrapping_add)
}

/// Moves the bytes of a blend: adds the sources word by word, wrapping, and writes the sums to every stream of `dst`.
///
/// Bytes after the last whole word are not written.
/// All streams have the same length.
pub fn blend(dst: &mut [&mut [u8]], sources: &[&[u8]]) {
    split_streams(dst, CHUNK).into_par_iter().enumerate().for_each(|(i, mut dst)| {
        let mut sums = [0u64; TILE / WORD];
        vectorised(
            #[inline(always)]
            || {
                let bytes = dst.first().map_or(0, |dst| dst.len());
                for start in (0..bytes).step_by(TILE) {
                    let n = TILE.min(bytes - start);
                    let sums = &mut sums[..n / WORD];
                    sums.fill(0);
                    for source in sources {
                        let source = &source[i * CHUNK + start..][..n];
                        prefetch::for_reading(source);
                        sums.iter_mut().zip(words(source)).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
                    }
                    for dst in &mut dst {
                        let words = dst[start..start + n].as_chunks_mut::<WORD>().0;
                        words.iter_mut().zip(&*sums).for_each(|(word, sum)| *word = sum.to_le_bytes());
                    }
                }
            },
        );
    });
}

#[inline(always)]
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<WORD>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// Splits all streams into chunks of `n` elements. Item `i` of the result holds chunk `i` of every stream.
pub fn split_streams<'a, T>(streams: &'a mut [&mut [T]], n: usize) -> Vec<Vec<&'a mut [T]>> {
    let mut chunks = Vec::new();
    for stream in streams {
        for (i, chunk) in stream.chunks_mut(n).enumerate() {
            if i == chunks.len() {
                chunks.push(Vec::new());
            }
            chunks[i].push(chunk);
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = CHUNK + TILE + 12;

    #[test]
    fn copy_writes_every_element() {
        let src: Vec<f32> = (0..N).map(|i| i as f32).collect();
        let mut dst = vec![0.0; N];
        copy(&mut dst, &src);
        assert_eq!(dst, src);
    }

    #[test]
    fn update_changes_every_element_once() {
        let read: Vec<f32> = (0..N).map(|i| i as f32).collect();
        let (mut a, mut b) = (vec![1.0; N], vec![2.0; N]);
        update(&mut [&mut a, &mut b], &read);
        assert!((0..N).all(|i| a[i] == i as f32 - 1.0 && b[i] == i as f32 - 2.0));
    }

    #[test]
    fn scan_and_blend_add_every_word_of_every_stream() {
        let bytes = |k: u64| -> Vec<u8> { (0..N as u64).flat_map(|i| (i * i + k).to_le_bytes()).collect() };
        let streams = [bytes(1), bytes(7), bytes(9)];
        let sources: Vec<&[u8]> = streams.iter().map(Vec::as_slice).collect();
        let squares: u64 = (0..N as u64).map(|i| i * i).sum();
        assert_eq!(scan(&sources), 3 * squares + 17 * N as u64);
        let (mut a, mut b) = (vec![0; 8 * N], vec![0; 8 * N]);
        blend(&mut [&mut a, &mut b], &sources);
        assert!(words(&a).enumerate().all(|(i, sum)| sum == 3 * (i * i) as u64 + 17));
        assert_eq!(a, b);
    }
}
