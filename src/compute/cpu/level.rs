//! Instruction sets that loops are compiled for. One is chosen at run time.

use super::fp_env::FpEnvGuard;

/// Instruction set of this machine. All levels give the same bits, and the last of [`SimdLevel::all`] is the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimdLevel(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl SimdLevel {
    /// Instruction set of every processor of the target: SSE2 on x86-64, NEON on ARM.
    pub const BASELINE: SimdLevel = SimdLevel(Set::Baseline);

    /// Returns the fastest level of this machine.
    pub fn best() -> SimdLevel {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return SimdLevel(Set::Avx512);
            }
            if has_avx2() {
                return SimdLevel(Set::Avx2);
            }
        }
        SimdLevel::BASELINE
    }

    /// Returns all levels of this machine, from the slowest to the fastest.
    pub fn all() -> Vec<SimdLevel> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut, reason = "there is one level"))]
        let mut all = vec![SimdLevel::BASELINE];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(has_avx2().then_some(SimdLevel(Set::Avx2)));
            all.extend(has_avx512().then_some(SimdLevel(Set::Avx512)));
        }
        all
    }

    /// Returns the name: `baseline`, `avx2` (with FMA and F16C) or `avx512` (F, BW, CD, DQ and VL in addition).
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// Runs a loop compiled for this instruction set. The closure and all functions it calls must be
    /// `#[inline(always)]`.
    #[inline(always)]
    pub(crate) fn run<R>(self, body: impl FnOnce() -> R) -> R {
        let _mode = FpEnvGuard::enter();
        match self.0 {
            Set::Baseline => body(),
            // SAFETY: a level is created only if the machine has its instructions.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::avx2(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::avx512(body) },
        }
    }

    /// Returns the equivalent of pulp, for loops that use its vectors.
    #[inline]
    pub(super) fn arch(self) -> pulp::Arch {
        #[cfg(target_arch = "x86_64")]
        match self.0 {
            Set::Baseline => {}
            Set::Avx2 => return pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3),
            Set::Avx512 => return pulp::x86::V4::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V4),
        }
        #[cfg(target_arch = "x86_64")]
        return pulp::Arch::Scalar;
        #[cfg(not(target_arch = "x86_64"))]
        pulp::Arch::new()
    }

    /// Returns true if there are vectors of 256 bits, multiply-adds and conversions of f16.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn has_avx2(self) -> bool {
        self.0 != Set::Baseline
    }

    /// Returns true if there are vectors of 512 bits.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn has_avx512(self) -> bool {
        self.0 == Set::Avx512
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("f16c") && pulp::x86::V3::is_available()
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("f16c") && pulp::x86::V4::is_available()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
    #[inline]
    pub(super) fn avx2<R>(body: impl FnOnce() -> R) -> R {
        body()
    }

    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    #[inline]
    pub(super) fn avx512<R>(body: impl FnOnce() -> R) -> R {
        body()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_level_is_last_and_names_are_distinct() {
        let all = SimdLevel::all();
        assert_eq!((all[0], *all.last().unwrap()), (SimdLevel::BASELINE, SimdLevel::best()));
        let mut names: Vec<_> = all.iter().map(|level| level.name()).collect();
        names.dedup();
        assert_eq!(names.len(), all.len());
        assert!(all.iter().all(|level| level.run(|| 7) == 7));
    }
}
