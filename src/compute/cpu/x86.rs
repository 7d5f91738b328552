//! Conversions of every dtype to vectors of f64, and of f64 to f16, by AVX2 with F16C and by AVX-512.
//!
//! The code that the compiler generates for the plain loops needs two to three times as many instructions.
//!
//! Each function returns how many elements it has done. The caller's plain loop does the rest, which on processors
//! without these instructions is all of them.

use safetensors::Dtype;

use super::SimdLevel;

/// Number of elements per step of [`add`]: whole cache lines of every stream.
pub(super) const STEP: usize = 32;

#[cfg(not(target_arch = "x86_64"))]
mod none {
    use super::{Dtype, SimdLevel};

    pub(in super::super) fn add<const K: usize>(
        _: SimdLevel,
        _: Dtype,
        _: &mut [f64],
        _: [&[u8]; K],
        _: [f64; K],
    ) -> usize {
        0
    }

    pub(in super::super) fn to_f64(_: SimdLevel, _: Dtype, _: &mut [f64], _: &[u8]) -> usize {
        0
    }

    pub(in super::super) fn f16_to_f32(_: SimdLevel, _: &mut [f32], _: &[u8]) -> usize {
        0
    }

    pub(in super::super) fn f16_from_f64(_: SimdLevel, _: &mut [u8], _: &[f64], _: f64) -> (usize, bool) {
        (0, true)
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use none::{add, f16_from_f64, f16_to_f32, to_f64};

#[cfg(target_arch = "x86_64")]
pub(super) use vectors::{add, f16_from_f64, f16_to_f32, to_f64};

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use super::super::prefetch;
    use super::{Dtype, STEP, SimdLevel};

    /// Number of elements that are loaded together.
    const LANES: usize = 8;

    /// Adds weighted sources of one dtype to `sums`, in their order, in whole steps of [`STEP`] elements.
    ///
    /// Returns the number of elements done, 0 on processors without the instructions. Each source holds at least as
    /// many elements as `sums`, at any alignment.
    #[inline(always)]
    pub(in super::super) fn add<const K: usize>(
        level: SimdLevel,
        dtype: Dtype,
        sums: &mut [f64],
        sources: [&[u8]; K],
        weights: [f64; K],
    ) -> usize {
        // SAFETY: the level has the features.
        unsafe {
            match (level.has_avx512(), level.has_avx2(), dtype) {
                (true, _, Dtype::F16) => of_f16::add_512(sums, sources, weights),
                (true, _, Dtype::BF16) => of_bf16::add_512(sums, sources, weights),
                (true, _, Dtype::F32) => of_f32::add_512(sums, sources, weights),
                (true, _, Dtype::F64) => of_f64::add_512(sums, sources, weights),
                (_, true, Dtype::F16) => of_f16::add_256(sums, sources, weights),
                (_, true, Dtype::BF16) => of_bf16::add_256(sums, sources, weights),
                (_, true, Dtype::F32) => of_f32::add_256(sums, sources, weights),
                (_, true, Dtype::F64) => of_f64::add_256(sums, sources, weights),
                _ => return 0,
            }
        }
        sums.len() / STEP * STEP
    }

    /// Converts whole groups of eight elements to f64.
    ///
    /// Returns the number of elements done, 0 on processors without the instructions. `src` holds at least as many
    /// elements as `dst`, at any alignment.
    #[inline(always)]
    pub(in super::super) fn to_f64(level: SimdLevel, dtype: Dtype, dst: &mut [f64], src: &[u8]) -> usize {
        // SAFETY: the level has the features.
        unsafe {
            match (level.has_avx512(), level.has_avx2(), dtype) {
                (true, _, Dtype::F16) => of_f16::to_f64_512(dst, src),
                (true, _, Dtype::BF16) => of_bf16::to_f64_512(dst, src),
                (true, _, Dtype::F32) => of_f32::to_f64_512(dst, src),
                (true, _, Dtype::F64) => of_f64::to_f64_512(dst, src),
                (_, true, Dtype::F16) => of_f16::to_f64_256(dst, src),
                (_, true, Dtype::BF16) => of_bf16::to_f64_256(dst, src),
                (_, true, Dtype::F32) => of_f32::to_f64_256(dst, src),
                (_, true, Dtype::F64) => of_f64::to_f64_256(dst, src),
                _ => return 0,
            }
        }
        dst.len() / LANES * LANES
    }

    /// Converts whole groups of eight elements to f32, as [`to_f64`].
    #[inline(always)]
    pub(in super::super) fn f16_to_f32(level: SimdLevel, dst: &mut [f32], src: &[u8]) -> usize {
        if !level.has_avx2() {
            return 0;
        }
        // SAFETY: the level has the features.
        unsafe { widen(dst, src) };
        dst.len() / LANES * LANES
    }

    /// Rounds whole groups of eight values to f16 by way of f32.
    ///
    /// Returns the number of elements done, 0 on processors without the instruction, and true if none of them is NaN or
    /// beyond the limit.
    #[inline(always)]
    pub(in super::super) fn f16_from_f64(level: SimdLevel, dst: &mut [u8], src: &[f64], limit: f64) -> (usize, bool) {
        let (whole, _) = src.as_chunks();
        let fits = if level.has_avx512() {
            // SAFETY: the level has the features.
            unsafe { narrow_512(dst, whole, limit) }
        } else if level.has_avx2() {
            // SAFETY: the level has the features.
            unsafe { narrow_256(dst, whole, limit) }
        } else {
            return (0, true);
        };
        (whole.len() * LANES, fits)
    }

    /// Defines the loops over elements of one dtype. `$wide` converts eight elements to one vector of f64, `$halves` to
    /// two.
    macro_rules! of_dtype {
        ($name:ident, $size:literal, $wide:ident, $halves:ident) => {
            mod $name {
                use std::arch::x86_64::*;

                use super::{LANES, STEP, prefetch};

                /// Bytes of one step, in groups that are loaded together.
                type Groups = [[u8; $size * LANES]; STEP / LANES];

                /// Splits a source into whole steps.
                #[inline(always)]
                fn steps(source: &[u8], elements: usize) -> &[Groups] {
                    &source.as_chunks().0.as_chunks().0[..elements / STEP]
                }

                #[target_feature(enable = "avx512f,avx512vl,f16c")]
                pub(super) fn add_512<const K: usize>(sums: &mut [f64], sources: [&[u8]; K], weights: [f64; K]) {
                    let weights = weights.map(|weight| _mm512_set1_pd(weight));
                    let sources = sources.map(|source| steps(source, sums.len()));
                    for (i, sums) in sums.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
                        sources.iter().for_each(|source| prefetch::for_reading(&source[i]));
                        for (j, sums) in sums.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                            // SAFETY: the reference covers the 8 sums; the instruction takes any alignment.
                            let mut acc = unsafe { _mm512_loadu_pd(sums.as_ptr()) };
                            for k in 0..K {
                                acc = _mm512_fmadd_pd(weights[k], super::$wide(&sources[k][i][j]), acc);
                            }
                            // SAFETY: as above.
                            unsafe { _mm512_storeu_pd(sums.as_mut_ptr(), acc) };
                        }
                    }
                }

                #[target_feature(enable = "avx2,fma,f16c")]
                pub(super) fn add_256<const K: usize>(sums: &mut [f64], sources: [&[u8]; K], weights: [f64; K]) {
                    let weights = weights.map(|weight| _mm256_set1_pd(weight));
                    let sources = sources.map(|source| steps(source, sums.len()));
                    for (i, sums) in sums.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
                        sources.iter().for_each(|source| prefetch::for_reading(&source[i]));
                        for (j, sums) in sums.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                            let (low, high) = sums.split_at_mut(4);
                            // SAFETY: each half has the 4 sums; the instruction takes any alignment.
                            let mut acc = unsafe { [_mm256_loadu_pd(low.as_ptr()), _mm256_loadu_pd(high.as_ptr())] };
                            for k in 0..K {
                                let values = super::$halves(&sources[k][i][j]);
                                acc[0] = _mm256_fmadd_pd(weights[k], values.0, acc[0]);
                                acc[1] = _mm256_fmadd_pd(weights[k], values.1, acc[1]);
                            }
                            // SAFETY: as above.
                            unsafe {
                                _mm256_storeu_pd(low.as_mut_ptr(), acc[0]);
                                _mm256_storeu_pd(high.as_mut_ptr(), acc[1]);
                            }
                        }
                    }
                }

                #[target_feature(enable = "avx512f,avx512vl,f16c")]
                pub(super) fn to_f64_512(dst: &mut [f64], src: &[u8]) {
                    let groups = src.as_chunks::<{ $size * LANES }>().0;
                    for (dst, group) in dst.as_chunks_mut::<LANES>().0.iter_mut().zip(groups) {
                        // SAFETY: the reference covers the 8 elements; the instruction takes any alignment.
                        unsafe { _mm512_storeu_pd(dst.as_mut_ptr(), super::$wide(group)) };
                    }
                }

                #[target_feature(enable = "avx2,fma,f16c")]
                pub(super) fn to_f64_256(dst: &mut [f64], src: &[u8]) {
                    let groups = src.as_chunks::<{ $size * LANES }>().0;
                    for (dst, group) in dst.as_chunks_mut::<LANES>().0.iter_mut().zip(groups) {
                        let (low, high) = super::$halves(group);
                        // SAFETY: the reference covers the 8 elements, and the second half begins at the fifth. The
                        // instruction takes any alignment.
                        unsafe {
                            _mm256_storeu_pd(dst.as_mut_ptr(), low);
                            _mm256_storeu_pd(dst.as_mut_ptr().add(4), high);
                        }
                    }
                }
            }
        };
    }

    of_dtype!(of_f16, 2, f16_wide, f16_halves);
    of_dtype!(of_bf16, 2, bf16_wide, bf16_halves);
    of_dtype!(of_f32, 4, f32_wide, f32_halves);
    of_dtype!(of_f64, 8, f64_wide, f64_halves);

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    fn f16_singles(group: &[u8; 16]) -> __m256 {
        // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(group.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn bf16_singles(group: &[u8; 16]) -> __m256 {
        // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
        let halves = unsafe { _mm_loadu_si128(group.as_ptr().cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn f32_singles(group: &[u8; 32]) -> __m256 {
        // SAFETY: the reference covers the 32 bytes; the instruction takes any alignment.
        unsafe { _mm256_loadu_ps(group.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn halves(singles: __m256) -> (__m256d, __m256d) {
        (_mm256_cvtps_pd(_mm256_castps256_ps128(singles)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(singles)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn f16_wide(group: &[u8; 16]) -> __m512d {
        _mm512_cvtps_pd(f16_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn bf16_wide(group: &[u8; 16]) -> __m512d {
        _mm512_cvtps_pd(bf16_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn f32_wide(group: &[u8; 32]) -> __m512d {
        _mm512_cvtps_pd(f32_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn f64_wide(group: &[u8; 64]) -> __m512d {
        // SAFETY: the reference covers the 64 bytes; the instruction takes any alignment.
        unsafe { _mm512_loadu_pd(group.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn f16_halves(group: &[u8; 16]) -> (__m256d, __m256d) {
        halves(f16_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn bf16_halves(group: &[u8; 16]) -> (__m256d, __m256d) {
        halves(bf16_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn f32_halves(group: &[u8; 32]) -> (__m256d, __m256d) {
        halves(f32_singles(group))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn f64_halves(group: &[u8; 64]) -> (__m256d, __m256d) {
        let [low, high] = [0, 32].map(|at| group[at..].as_ptr().cast());
        // SAFETY: the reference covers the 64 bytes; the instruction takes any alignment.
        unsafe { (_mm256_loadu_pd(low), _mm256_loadu_pd(high)) }
    }

    #[target_feature(enable = "avx,f16c")]
    fn widen(dst: &mut [f32], src: &[u8]) {
        for (dst, group) in dst.as_chunks_mut::<LANES>().0.iter_mut().zip(src.as_chunks().0) {
            // SAFETY: the reference covers the 8 elements; the instruction takes any alignment.
            unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), f16_singles(group)) };
        }
    }

    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn narrow_512(dst: &mut [u8], src: &[[f64; LANES]], limit: f64) -> bool {
        let limit = _mm512_set1_pd(limit);
        let mut fits = !0;
        for (dst, src) in dst.as_chunks_mut::<16>().0.iter_mut().zip(src) {
            // SAFETY: the reference covers the 8 elements; the instruction takes any alignment.
            let values = unsafe { _mm512_loadu_pd(src.as_ptr()) };
            fits &= _mm512_cmp_pd_mask::<_CMP_LE_OQ>(_mm512_abs_pd(values), limit);
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_cvtpd_ps(values));
            // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
            unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), halves) };
        }
        fits == !0
    }

    #[target_feature(enable = "avx,f16c")]
    fn narrow_256(dst: &mut [u8], src: &[[f64; LANES]], limit: f64) -> bool {
        let (limit, sign) = (_mm256_set1_pd(limit), _mm256_set1_pd(-0.0));
        let mut fits = _mm256_cmp_pd::<_CMP_TRUE_UQ>(limit, limit);
        for (dst, src) in dst.as_chunks_mut::<16>().0.iter_mut().zip(src) {
            // SAFETY: the reference covers the 8 elements, and the second half begins at the fifth. The instruction
            // takes any alignment.
            let both = unsafe { [_mm256_loadu_pd(src.as_ptr()), _mm256_loadu_pd(src.as_ptr().add(4))] };
            for values in both {
                fits = _mm256_and_pd(fits, _mm256_cmp_pd::<_CMP_LE_OQ>(_mm256_andnot_pd(sign, values), limit));
            }
            let singles = _mm256_set_m128(_mm256_cvtpd_ps(both[1]), _mm256_cvtpd_ps(both[0]));
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(singles);
            // SAFETY: the reference covers the 16 bytes; the instruction takes any alignment.
            unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), halves) };
        }
        _mm256_movemask_pd(fits) == 0xf
    }
}
