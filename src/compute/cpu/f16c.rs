//! f16 to wider types by the CPU's own instruction (F16C), where it has one: one instead of the dozen of the integer form
//! in `convert`, and f16 snapshots are what synthesis reads most.

/// Adds four f16 sources, weighted and in their order, to whole groups of eight sums, and returns how many sums that were:
/// 0 on CPUs without the instructions. Each source holds as many elements as there are sums.
#[cfg(target_arch = "x86_64")]
pub(super) use x86::add;

/// As on x86-64, for CPUs that have no such instruction.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn add(_: &mut [f64], _: [&[u8]; 4], _: [f64; 4]) -> usize {
    0
}

/// Widens whole groups of eight elements and returns how many elements that were: 0 on CPUs without the instruction.
pub(super) trait Widen: Sized {
    /// `src` holds at least as many f16 as `dst` has elements, of any alignment.
    fn widen(dst: &mut [Self], src: &[u8]) -> usize;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_loadu_si128, _mm256_castps256_ps128, _mm256_cvtph_ps, _mm256_cvtps_pd, _mm256_extractf128_ps,
        _mm256_storeu_pd, _mm256_storeu_ps, _mm512_cvtps_pd, _mm512_fmadd_pd, _mm512_loadu_pd, _mm512_set1_pd,
        _mm512_storeu_pd,
    };

    use super::Widen;

    const LANES: usize = 8;

    fn is_available() -> bool {
        is_x86_feature_detected!("f16c") && is_x86_feature_detected!("avx")
    }

    impl Widen for f32 {
        fn widen(dst: &mut [f32], src: &[u8]) -> usize {
            if !is_available() {
                return 0;
            }
            // SAFETY: the features were just found.
            unsafe { to_f32(dst, src) }
        }
    }

    impl Widen for f64 {
        fn widen(dst: &mut [f64], src: &[u8]) -> usize {
            if !is_available() {
                return 0;
            }
            // SAFETY: the features were just found.
            unsafe { to_f64(dst, src) }
        }
    }

    pub(in super::super) fn add(sums: &mut [f64], sources: [&[u8]; 4], weights: [f64; 4]) -> usize {
        if !is_x86_feature_detected!("avx512f") || !is_available() {
            return 0;
        }
        // SAFETY: the features were just found.
        unsafe { add_eights(sums, sources, weights) }
    }

    #[target_feature(enable = "avx512f,f16c")]
    fn add_eights(sums: &mut [f64], sources: [&[u8]; 4], weights: [f64; 4]) -> usize {
        let [a, b, c, d] = sources.map(|bytes| bytes.as_chunks::<16>().0.iter());
        let weights = weights.map(|weight| _mm512_set1_pd(weight));
        let groups = sums.as_chunks_mut::<LANES>().0.iter_mut().zip(a.zip(b).zip(c.zip(d)));
        groups
            .map(|(sums, ((a, b), (c, d)))| {
                // SAFETY: the references cover the 8 sums and the 16 bytes of each source; the instructions take any
                // alignment.
                unsafe {
                    let mut sum = _mm512_loadu_pd(sums.as_ptr());
                    for (halves, weight) in [a, b, c, d].into_iter().zip(weights) {
                        let singles = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast::<__m128i>()));
                        sum = _mm512_fmadd_pd(weight, _mm512_cvtps_pd(singles), sum);
                    }
                    _mm512_storeu_pd(sums.as_mut_ptr(), sum);
                }
                LANES
            })
            .sum()
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

    #[target_feature(enable = "avx,f16c")]
    fn to_f64(dst: &mut [f64], src: &[u8]) -> usize {
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
}

#[cfg(not(target_arch = "x86_64"))]
impl<T> Widen for T {
    fn widen(_: &mut [T], _: &[u8]) -> usize {
        0
    }
}
