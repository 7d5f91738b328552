//! Large arrays.

use bytemuck::Zeroable;

/// Zeros that no thread has touched yet, in huge pages where the system has them to give: a loop over several such arrays
/// looks up far fewer addresses, and the first touch of each page, which costs as much as the loop, is of 2 MiB.
pub(crate) fn zeros<T: Zeroable>(elements: usize) -> Vec<T> {
    let zeros = bytemuck::zeroed_vec(elements);
    ask_for_huge_pages(&zeros);
    zeros
}

/// Arrays below this many bytes are left as they are.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// What every page size of Linux divides, up to 64 KiB.
#[cfg(target_os = "linux")]
const PAGE: usize = 64 << 10;

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(array: &[T]) {
    use rustix::mm::{Advice, madvise};

    let (start, bytes) = (array.as_ptr().cast::<u8>(), size_of_val(array));
    if bytes < LARGE {
        return;
    }
    let before = start.addr().next_multiple_of(PAGE) - start.addr();
    let whole = (bytes - before) / PAGE * PAGE;
    // SAFETY: the pages lie within the array; how large they are changes nothing of what they hold.
    let asked = unsafe { madvise(start.wrapping_add(before).cast_mut().cast(), whole, Advice::LinuxHugepage) };
    // Small ones do as well, only slower.
    let _ = asked;
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &[T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_any_size_are_zeros_that_can_be_written() {
        for elements in [0, 1, 1000, LARGE / 4 - 1, LARGE / 4, LARGE + 77_777] {
            let mut array: Vec<f32> = zeros(elements);
            assert!(array.len() == elements && array.iter().all(|&x| x == 0.0));
            array.fill(1.5);
            array.push(2.0);
            assert!(array[..elements].iter().all(|&x| x == 1.5));
        }
    }
}
