//! f16 to wider types and back by the CPU's own instructions (F16C), where it has them: one instead of the dozen of the
//! integer form in `convert`, and f16 snapshots are what synthesis reads most.

use super::Level;

/// Adds f16 sources, weighted and in their order, to a tile of sums that begins at element `start` of each; false, with
/// nothing done, on CPUs without the instructions and for a tile that is no whole number of vectors.
#[cfg(target_arch = "x86_64")]
pub(super) use x86::add;

/// As on x86-64, for CPUs that have no such instructions.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn add(_: Level, _: &mut [f64], _: &[&[u8]], _: &[f64], _: usize) -> bool {
    false
}

/// Rounds whole groups of eight values to f16 by way of f32, and returns how many elements that were, 0 on CPUs without the
/// instruction, and whether none of them was NaN or beyond the limit.
#[cfg(target_arch = "x86_64")]
pub(super) use x86::narrow;

/// As on x86-64, for CPUs that have no such instructions.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn narrow(_: Level, _: &mut [u8], _: &[f64], _: f64) -> (usize, bool) {
    (0, true)
}

/// Widens whole groups of eight elements and returns how many elements that were: 0 on CPUs without the instruction.
pub(super) trait Widen: Sized {
    /// `src` holds at least as many f16 as `dst` has elements, of any alignment.
    fn widen(level: Level, dst: &mut [Self], src: &[u8]) -> usize;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _CMP_LE_OQ, _CMP_TRUE_UQ, _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_and_pd,
        _mm256_andnot_pd, _mm256_castps256_ps128, _mm256_cmp_pd, _mm256_cvtpd_ps, _mm256_cvtph_ps, _mm256_cvtps_pd,
        _mm256_cvtps_ph, _mm256_extractf128_ps, _mm256_fmadd_pd, _mm256_loadu_pd, _mm256_movemask_pd, _mm256_set_m128,
        _mm256_set1_pd, _mm256_setzero_pd, _mm256_storeu_pd, _mm256_storeu_ps, _mm512_abs_pd, _mm512_cmp_pd_mask,
        _mm512_cvtpd_ps, _mm512_cvtps_pd, _mm512_fmadd_pd, _mm512_loadu_pd, _mm512_set1_pd, _mm512_setzero_pd,
        _mm512_storeu_pd,
    };

    use super::super::prefetch;
    use super::{Level, Widen};

    const LANES: usize = 8;

    /// The elements of a tile, and of half of one.
    const TILE: usize = 64;
    const HALF: usize = 32;

    impl Widen for f32 {
        #[inline(always)]
        fn widen(level: Level, dst: &mut [f32], src: &[u8]) -> usize {
            if !level.has_f16c() {
                return 0;
            }
            // SAFETY: the level has the features.
            unsafe { to_f32(dst, src) }
        }
    }

    impl Widen for f64 {
        #[inline(always)]
        fn widen(level: Level, dst: &mut [f64], src: &[u8]) -> usize {
            if level.has_avx512() {
                // SAFETY: the level has the features.
                return unsafe { to_f64_512(dst, src) };
            }
            if level.has_f16c() {
                // SAFETY: the level has the features.
                return unsafe { to_f64_256(dst, src) };
            }
            0
        }
    }

    #[inline(always)]
    pub(in super::super) fn narrow(level: Level, dst: &mut [u8], src: &[f64], limit: f64) -> (usize, bool) {
        let (whole, _) = src.as_chunks();
        let fits = if level.has_avx512() {
            // SAFETY: the level has the features.
            unsafe { from_f64_512(dst, whole, limit) }
        } else if level.has_f16c() {
            // SAFETY: the level has the features.
            unsafe { from_f64_256(dst, whole, limit) }
        } else {
            return (0, true);
        };
        (whole.len() * LANES, fits)
    }

    #[inline(always)]
    pub(in super::super) fn add(
        level: Level,
        sums: &mut [f64],
        sources: &[&[u8]],
        weights: &[f64],
        start: usize,
    ) -> bool {
        let Ok(sums) = <&mut [f64; TILE]>::try_from(sums) else { return false };
        if level.has_avx512() {
            // SAFETY: the level has the features.
            unsafe { add_512(sums, sources, weights, start) };
        } else if level.has_f16c() {
            // SAFETY: the level has the features.
            unsafe { add_256(sums, sources, weights, start) };
        } else {
            return false;
        }
        true
    }

    /// The tile of a source from element `start` on.
    #[inline(always)]
    fn tile<const N: usize>(source: &[u8], start: usize) -> &[[u8; 2 * LANES]] {
        source[2 * start..2 * (start + N)].as_chunks().0
    }

    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn add_512(sums: &mut [f64; TILE], sources: &[&[u8]], weights: &[f64], start: usize) {
        let mut held = [_mm512_setzero_pd(); TILE / LANES];
        for (held, sums) in held.iter_mut().zip(sums.as_chunks::<LANES>().0) {
            // SAFETY: the reference covers the 8 sums; the instruction takes any alignment.
            *held = unsafe { _mm512_loadu_pd(sums.as_ptr()) };
        }
        for (source, &weight) in sources.iter().zip(weights) {
            let (halves, weight) = (tile::<TILE>(source, start), _mm512_set1_pd(weight));
            prefetch::reading(halves);
            for (held, halves) in held.iter_mut().zip(halves) {
                // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
                let halves = unsafe { _mm_loadu_si128(halves.as_ptr().cast::<__m128i>()) };
                *held = _mm512_fmadd_pd(weight, _mm512_cvtps_pd(_mm256_cvtph_ps(halves)), *held);
            }
        }
        for (held, sums) in held.iter().zip(sums.as_chunks_mut::<LANES>().0) {
            // SAFETY: the reference covers the 8 sums; the instruction takes any alignment.
            unsafe { _mm512_storeu_pd(sums.as_mut_ptr(), *held) };
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_256(sums: &mut [f64; TILE], sources: &[&[u8]], weights: &[f64], start: usize) {
        for (i, sums) in sums.as_chunks_mut::<HALF>().0.iter_mut().enumerate() {
            let mut held = [_mm256_setzero_pd(); HALF / 4];
            for (held, sums) in held.iter_mut().zip(sums.as_chunks::<4>().0) {
                // SAFETY: the reference covers the 4 sums; the instruction takes any alignment.
                *held = unsafe { _mm256_loadu_pd(sums.as_ptr()) };
            }
            for (source, &weight) in sources.iter().zip(weights) {
                let (halves, weight) = (tile::<HALF>(source, start + i * HALF), _mm256_set1_pd(weight));
                prefetch::reading(halves);
                for (held, halves) in held.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                    // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
                    let halves = unsafe { _mm_loadu_si128(halves.as_ptr().cast::<__m128i>()) };
                    let singles = _mm256_cvtph_ps(halves);
                    let (low, high) = (_mm256_castps256_ps128(singles), _mm256_extractf128_ps::<1>(singles));
                    held[0] = _mm256_fmadd_pd(weight, _mm256_cvtps_pd(low), held[0]);
                    held[1] = _mm256_fmadd_pd(weight, _mm256_cvtps_pd(high), held[1]);
                }
            }
            for (held, sums) in held.iter().zip(sums.as_chunks_mut::<4>().0) {
                // SAFETY: the reference covers the 4 sums; the instruction takes any alignment.
                unsafe { _mm256_storeu_pd(sums.as_mut_ptr(), *held) };
            }
        }
    }

    #[target_feature(enable = "avx,f16c")]
    fn to_f32(dst: &mut [f32], src: &[u8]) -> usize {
        let groups = dst.as_chunks_mut::<LANES>().0.iter_mut().zip(src.as_chunks::<16>().0);
        groups
            .map(|(dst, src)| {
                // SAFETY: the references cover the 16 bytes that are loaded and the 8 elements that are stored; both
                // instructions take any alignment.
                unsafe {
                    let halves = _mm_loadu_si128(src.as_ptr().cast::<__m128i>());
                    _mm256_storeu_ps(dst.as_mut_ptr(), _mm256_cvtph_ps(halves));
                }
                LANES
            })
            .sum()
    }

    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn to_f64_512(dst: &mut [f64], src: &[u8]) -> usize {
        let groups = dst.as_chunks_mut::<LANES>().0.iter_mut().zip(src.as_chunks::<16>().0);
        groups
            .map(|(dst, src)| {
                // SAFETY: the references cover the 16 bytes that are loaded and the 8 elements that are stored; both
                // instructions take any alignment.
                unsafe {
                    let singles = _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast::<__m128i>()));
                    _mm512_storeu_pd(dst.as_mut_ptr(), _mm512_cvtps_pd(singles));
                }
                LANES
            })
            .sum()
    }

    #[target_feature(enable = "avx,f16c")]
    fn to_f64_256(dst: &mut [f64], src: &[u8]) -> usize {
        let groups = dst.as_chunks_mut::<LANES>().0.iter_mut().zip(src.as_chunks::<16>().0);
        groups
            .map(|(dst, src)| {
                // SAFETY: the references cover the 16 bytes that are loaded and the 8 elements that are stored, the
                // second half 4 elements on; all instructions take any alignment.
                unsafe {
                    let singles = _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast::<__m128i>()));
                    let (low, high) = (_mm256_castps256_ps128(singles), _mm256_extractf128_ps::<1>(singles));
                    _mm256_storeu_pd(dst.as_mut_ptr(), _mm256_cvtps_pd(low));
                    _mm256_storeu_pd(dst.as_mut_ptr().add(4), _mm256_cvtps_pd(high));
                }
                LANES
            })
            .sum()
    }

    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn from_f64_512(dst: &mut [u8], src: &[[f64; LANES]], limit: f64) -> bool {
        let limit = _mm512_set1_pd(limit);
        let mut fits = !0;
        for (dst, src) in dst.as_chunks_mut::<16>().0.iter_mut().zip(src) {
            // SAFETY: the references cover the 8 elements that are loaded and the 16 bytes that are stored; both
            // instructions take any alignment.
            unsafe {
                let values = _mm512_loadu_pd(src.as_ptr());
                fits &= _mm512_cmp_pd_mask::<_CMP_LE_OQ>(_mm512_abs_pd(values), limit);
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_cvtpd_ps(values));
                _mm_storeu_si128(dst.as_mut_ptr().cast::<__m128i>(), halves);
            }
        }
        fits == !0
    }

    #[target_feature(enable = "avx,f16c")]
    fn from_f64_256(dst: &mut [u8], src: &[[f64; LANES]], limit: f64) -> bool {
        let (limit, sign) = (_mm256_set1_pd(limit), _mm256_set1_pd(-0.0));
        let mut fits = _mm256_cmp_pd::<_CMP_TRUE_UQ>(limit, limit);
        for (dst, src) in dst.as_chunks_mut::<16>().0.iter_mut().zip(src) {
            // SAFETY: the references cover the 8 elements that are loaded, the second half 4 on, and the 16 bytes that are
            // stored; all instructions take any alignment.
            unsafe {
                let (low, high) = (_mm256_loadu_pd(src.as_ptr()), _mm256_loadu_pd(src.as_ptr().add(4)));
                for values in [low, high] {
                    fits = _mm256_and_pd(fits, _mm256_cmp_pd::<_CMP_LE_OQ>(_mm256_andnot_pd(sign, values), limit));
                }
                let singles = _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(singles);
                _mm_storeu_si128(dst.as_mut_ptr().cast::<__m128i>(), halves);
            }
        }
        _mm256_movemask_pd(fits) == 0xf
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl<T> Widen for T {
    fn widen(_: Level, _: &mut [T], _: &[u8]) -> usize {
        0
    }
}
