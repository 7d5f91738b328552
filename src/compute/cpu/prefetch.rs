//! Hints that bytes will soon be read, or written: loops over many streams at once outrun what the hardware foresees.

/// How far ahead of the elements at work, in bytes of a stream: measured, flat from 256 to 1024.
pub(super) const AHEAD: usize = 512;

/// The bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Fetches the lines [`AHEAD`] of a slice, as many as it has; they need not exist.
#[inline(always)]
pub(crate) fn reading<T>(slice: &[T]) {
    lines::<T, false>(slice.as_ptr(), size_of_val(slice));
}

/// As [`reading`], of lines that will be written.
#[inline(always)]
pub(crate) fn writing<T>(slice: &[T]) {
    lines::<T, true>(slice.as_ptr(), size_of_val(slice));
}

#[inline(always)]
fn lines<T, const WRITE: bool>(start: *const T, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        line_at::<WRITE>(start.cast::<i8>().wrapping_add(AHEAD + line));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn line_at<const WRITE: bool>(at: *const i8) {
    use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint reads nothing and faults on no address; processors without the second one take it for no operation.
    unsafe { if WRITE { _mm_prefetch::<_MM_HINT_ET0>(at) } else { _mm_prefetch::<_MM_HINT_T0>(at) } }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn line_at<const WRITE: bool>(at: *const i8) {
    // SAFETY: a hint reads nothing, faults on no address and changes no register.
    unsafe {
        if WRITE {
            std::arch::asm!("prfm pstl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
        } else {
            std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline(always)]
fn line_at<const WRITE: bool>(_: *const i8) {}
