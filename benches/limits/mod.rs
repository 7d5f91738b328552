//! Limits of the machine, measured beside the benchmarks.

#![allow(dead_code, reason = "each benchmark uses some of these")]

use std::hint::black_box;
use std::time::Instant;

use posthoc_ema::compute::cpu::limits;

/// Returns the seconds of the fastest of five runs.
pub fn best_seconds(mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..5).map(once).fold(f64::MAX, f64::min)
}

/// Measures the bytes that a copy with all threads reads and writes per second.
pub fn copy_bytes_per_second(bytes: usize) -> f64 {
    let src = vec![1f32; bytes / size_of::<f32>()];
    let mut dst = vec![0f32; src.len()];
    let seconds = best_seconds(|| limits::copy(&mut dst, &src));
    assert_eq!(black_box(&dst), &src);
    2.0 * bytes as f64 / seconds
}

/// Measures the bytes per second of adding up mapped files as 64-bit words, with all threads.
pub fn scan_bytes_per_second(slices: &[&[u8]]) -> f64 {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let seconds = best_seconds(|| {
        black_box(limits::scan(slices));
    });
    total as f64 / seconds
}

/// Prints a rate and its share of the limit.
pub fn report(name: &str, bytes: usize, seconds: f64, limit: f64, limit_name: &str) {
    let reached = bytes as f64 / seconds;
    println!(
        "{name}: {:.1} GB/s, {:.0}% of {limit_name} ({:.1} GB/s)",
        reached / 1e9,
        100.0 * reached / limit,
        limit / 1e9
    );
}
