//! What the machine can do at most, measured beside what is timed.

#![allow(dead_code, reason = "each benchmark uses some of these")]

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

const CHUNK: usize = 1 << 20;

/// The best of several runs, in seconds.
pub fn best_seconds(mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..5).map(once).fold(f64::MAX, f64::min)
}

/// Bytes read and written per second by a copy with all threads.
pub fn copy_bytes_per_second(bytes: usize) -> f64 {
    let src = vec![1u8; bytes];
    let mut dst = vec![0u8; bytes];
    let copy = || dst.par_chunks_mut(CHUNK).zip(src.par_chunks(CHUNK)).for_each(|(dst, src)| dst.copy_from_slice(src));
    let seconds = best_seconds(copy);
    assert_eq!(black_box(&dst), &src);
    2.0 * bytes as f64 / seconds
}

/// Bytes per second of adding up mapped files with all threads, as 64-bit words.
pub fn scan_bytes_per_second(slices: &[&[u8]]) -> f64 {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("words have 8 bytes"));
    let sum = |chunk: &[u8]| chunk.chunks_exact(8).map(word).fold(0, u64::wrapping_add);
    let scan = || slices.par_iter().map(|slice| slice.par_chunks(CHUNK).map(sum).reduce(|| 0, u64::wrapping_add)).sum();
    let seconds = best_seconds(|| {
        let total: u64 = scan();
        black_box(total);
    });
    total as f64 / seconds
}

/// Prints what was reached beside the limit.
pub fn report(name: &str, bytes: usize, seconds: f64, limit: f64, limit_name: &str) {
    let reached = bytes as f64 / seconds;
    println!(
        "{name}: {:.1} GB/s, {:.0}% of {limit_name} ({:.1} GB/s)",
        reached / 1e9,
        100.0 * reached / limit,
        limit / 1e9
    );
}
