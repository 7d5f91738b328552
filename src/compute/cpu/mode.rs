//! The mode of floating-point arithmetic of the calling thread.
//!
//! Other libraries switch it: `torch.set_flush_denormal(True)`, or one that was linked with fast mathematics, has
//! subnormal numbers taken for zero, and threads that are started inherit that. Averages would then depend on what else a
//! process does. Loops run in the mode that IEEE 754 and Rust prescribe; the caller gets his own back.

/// Until it is dropped, arithmetic of this thread keeps subnormal numbers and rounds to nearest.
pub(super) struct FpEnvGuard {
    /// What is to be put back.
    before: Option<Mode>,
}

impl FpEnvGuard {
    #[inline(always)]
    pub(super) fn enter() -> FpEnvGuard {
        let before = read();
        if before & KEPT == PRESCRIBED & KEPT {
            return FpEnvGuard { before: None };
        }
        write(before & !KEPT | PRESCRIBED & KEPT);
        FpEnvGuard { before: Some(before) }
    }
}

impl Drop for FpEnvGuard {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(before) = self.before {
            write(before);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod register {
    /// MXCSR.
    pub type Mode = u32;

    /// All exceptions masked, none of the bits below.
    pub const PRESCRIBED: Mode = 0x1f80;

    /// Subnormal operands as zero (6), masks (7 to 12), rounding (13, 14), subnormal results as zero (15): the rest says
    /// what has happened.
    pub const KEPT: Mode = 0xffc0;

    #[inline(always)]
    pub fn read() -> Mode {
        let mut mode = 0;
        // SAFETY: the instruction writes four bytes, those of `mode`.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack, preserves_flags)) };
        mode
    }

    #[inline(always)]
    pub fn write(mode: Mode) {
        // SAFETY: the instruction reads four bytes, those of `mode`, no bit of which is reserved: they were read before,
        // but for bits that are defined.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, preserves_flags)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod register {
    /// FPCR.
    pub type Mode = u64;

    pub const PRESCRIBED: Mode = 0;

    /// Subnormal numbers as zero in half precision (19), rounding (22, 23), subnormal numbers as zero (24).
    pub const KEPT: Mode = 1 << 19 | 3 << 22 | 1 << 24;

    #[inline(always)]
    pub fn read() -> Mode {
        let mode;
        // SAFETY: the instruction changes one register, that of `mode`.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nostack, preserves_flags)) };
        mode
    }

    #[inline(always)]
    pub fn write(mode: Mode) {
        // SAFETY: the mode was read before, but for bits that are defined.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode, options(nostack, preserves_flags)) };
    }
}

/// Elsewhere it is left as it is.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod register {
    pub type Mode = u32;

    pub const PRESCRIBED: Mode = 0;
    pub const KEPT: Mode = 0;

    pub fn read() -> Mode {
        0
    }

    pub fn write(_: Mode) {}
}

use register::{KEPT, Mode, PRESCRIBED, read, write};

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use std::hint::black_box;

    use safetensors::Dtype;

    use super::super::{Averages, Blend, Incoming, Layout, Precision, SimdLevel, blend_with, update_with};
    use super::*;

    /// Subnormal numbers as zero, and rounding down.
    #[cfg(target_arch = "x86_64")]
    const SWITCHED: Mode = 1 << 15 | 1 << 6 | 1 << 13;
    #[cfg(target_arch = "aarch64")]
    const SWITCHED: Mode = 1 << 24 | 2 << 22;

    /// Does something as a process does it that has switched the mode.
    fn switched<R>(body: impl FnOnce() -> R) -> R {
        let before = read();
        write(before | SWITCHED);
        let done = body();
        // It is still switched.
        assert_eq!(read() & SWITCHED, SWITCHED);
        write(before);
        done
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn the_mode_of_this_test_is_a_switch() {
        // A call: the compiler takes the mode for constant and moves arithmetic as it likes.
        #[inline(never)]
        fn half(value: f32) -> f32 {
            black_box(value) * 0.5
        }
        assert_eq!((half(f32::MIN_POSITIVE), switched(|| half(f32::MIN_POSITIVE))), (f32::MIN_POSITIVE / 2.0, 0.0));
    }

    #[test]
    fn results_do_not_depend_on_the_mode_of_the_caller() {
        let values: Vec<f32> = (0..333).map(|i| (i as f32 - 100.0) * 1.1e-39).collect();
        let source = bytes(&values);
        let layout = Layout::new([values.len()]);
        for level in SimdLevel::all() {
            let blended = || {
                let blend = Blend { dtypes: &[Dtype::F32; 3], weights: &[0.3, -0.9, 0.7], output: Dtype::F32 };
                let mut dst = vec![0; source.len()];
                blend_with(level, &mut [&mut dst[..]], &[&source[..]; 3], &blend).unwrap();
                let many = Blend { weights: &[0.3, -0.9, 0.7, 0.1, 0.2, 0.3], ..blend };
                let (mut one, mut other) = (dst.clone(), dst.clone());
                blend_with(level, &mut [&mut one[..], &mut other[..]], &[&source[..]; 3], &many).unwrap();
                [dst, one, other].concat()
            };
            assert!(blended() == switched(blended), "{}", level.name());
            assert!(blended().iter().any(|&byte| byte != 0));
            for precision in [Precision::Plain, Precision::Compensated] {
                let updated = || {
                    let mut averages = [Averages::zeros(&layout, precision)];
                    let incoming = [Incoming { bytes: &source, dtype: Dtype::F32 }];
                    for weight in [1.0, 0.3, 0.1] {
                        update_with(level, &mut averages, &incoming, &layout, &[weight]);
                    }
                    averages
                };
                // Printed in the caller's mode, subnormal numbers would be zeros.
                let bits = |[averages]: [Averages; 1]| averages.high.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let (plain, other) = (bits(updated()), bits(switched(updated)));
                assert!(plain == other && plain.iter().any(|&bits| bits != 0), "{} {precision:?}", level.name());
            }
        }
    }
}
