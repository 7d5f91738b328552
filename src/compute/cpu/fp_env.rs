//! Floating-point environment of the calling thread.
//!
//! Other libraries change it: `torch.set_flush_denormal(True)`, or a library linked with fast mathematics, makes the
//! processor treat subnormal numbers as zero, and new threads inherit that. Averages would then depend on unrelated
//! code of the process. Loops run in the environment that IEEE 754 and Rust prescribe, and restore the caller's
//! afterwards.

/// Guard under which arithmetic of this thread keeps subnormal numbers and rounds to nearest.
pub(super) struct FpEnvGuard {
    /// Mode to restore, if it was changed.
    before: Option<Mode>,
}

impl FpEnvGuard {
    #[inline(always)]
    pub(super) fn enter() -> FpEnvGuard {
        let before = read();
        if before & CONTROL == DEFAULT & CONTROL {
            return FpEnvGuard { before: None };
        }
        write(before & !CONTROL | DEFAULT & CONTROL);
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
    /// Value of MXCSR.
    pub type Mode = u32;

    /// Mode with all exceptions masked, rounding to nearest, and subnormal numbers kept.
    pub const DEFAULT: Mode = 0x1f80;

    /// Bits that control arithmetic: subnormal operands as zero (6), exception masks (7 to 12), rounding (13, 14),
    /// subnormal results as zero (15). The other bits record past exceptions.
    pub const CONTROL: Mode = 0xffc0;

    #[inline(always)]
    pub fn read() -> Mode {
        let mut mode = 0;
        // SAFETY: the instruction writes the four bytes of `mode`.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack, preserves_flags)) };
        mode
    }

    #[inline(always)]
    pub fn write(mode: Mode) {
        // SAFETY: the instruction reads the four bytes of `mode`. No reserved bit is set: the value was read before,
        // and only defined bits were changed.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, preserves_flags)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod register {
    /// Value of FPCR.
    pub type Mode = u64;

    pub const DEFAULT: Mode = 0;

    /// Bits that control arithmetic: subnormal numbers as zero in half precision (19), rounding (22, 23), subnormal
    /// numbers as zero (24).
    pub const CONTROL: Mode = 1 << 19 | 3 << 22 | 1 << 24;

    #[inline(always)]
    pub fn read() -> Mode {
        let mode;
        // SAFETY: the instruction changes only the register of `mode`.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nostack, preserves_flags)) };
        mode
    }

    #[inline(always)]
    pub fn write(mode: Mode) {
        // SAFETY: the mode was read before, and only defined bits were changed.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode, options(nostack, preserves_flags)) };
    }
}

/// Other processors keep their mode.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod register {
    pub type Mode = u32;

    pub const DEFAULT: Mode = 0;
    pub const CONTROL: Mode = 0;

    pub fn read() -> Mode {
        0
    }

    pub fn write(_: Mode) {}
}

use register::{CONTROL, DEFAULT, Mode, read, write};

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use std::hint::black_box;

    use safetensors::Dtype;

    use super::super::{
        Averages, Blend, Incoming, Layout, Precision, SimdLevel, UpdateWeights, blend_with, update_with,
    };
    use super::*;

    /// Bits that treat subnormal numbers as zero and round down.
    #[cfg(target_arch = "x86_64")]
    const SWITCHED: Mode = 1 << 15 | 1 << 6 | 1 << 13;
    #[cfg(target_arch = "aarch64")]
    const SWITCHED: Mode = 1 << 24 | 2 << 22;

    /// Runs `body` as in a process that has switched the mode.
    fn switched<R>(body: impl FnOnce() -> R) -> R {
        let before = read();
        write(before | SWITCHED);
        let done = body();
        // The caller's mode has been restored.
        assert_eq!(read() & SWITCHED, SWITCHED);
        write(before);
        done
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn switched_mode_flushes_subnormal_numbers() {
        // Not inlined, because the compiler assumes a constant mode and moves arithmetic across the switch.
        #[inline(never)]
        fn half(value: f32) -> f32 {
            black_box(value) * 0.5
        }
        assert_eq!((half(f32::MIN_POSITIVE), switched(|| half(f32::MIN_POSITIVE))), (f32::MIN_POSITIVE / 2.0, 0.0));
    }

    #[test]
    fn blend_and_update_keep_bits_in_switched_mode() {
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
                        update_with(level, &mut averages, &incoming, &layout, UpdateWeights::at(7, &[weight]));
                    }
                    averages
                };
                // Compares bits, because the caller's mode treats subnormal numbers as zeros.
                let bits = |[averages]: [Averages; 1]| averages.high.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let (plain, other) = (bits(updated()), bits(switched(updated)));
                assert!(plain == other && plain.iter().any(|&bits| bits != 0), "{} {precision:?}", level.name());
            }
        }
    }
}
