//! Advice to the system about the pages of large arrays.

#[cfg(target_os = "linux")]
#[cfg(feature = "cuda")]
pub(crate) use linux::keep_from_children;
#[cfg(target_os = "linux")]
pub(crate) use linux::{release_pages, use_large_pages};

#[cfg(target_os = "linux")]
mod linux {
    use bytemuck::Pod;
    use rustix::mm::{Advice, madvise};

    /// Bytes below which the call costs more than it saves.
    const LARGE: usize = 1 << 20;

    /// Largest size of a base page on any system.
    const PAGE: usize = 64 << 10;

    /// Asks for large pages, of which a loop over several arrays looks up far fewer addresses.
    pub(crate) fn use_large_pages<T: Pod>(memory: &mut [T]) {
        if let Some((start, bytes)) = whole_pages(memory) {
            // SAFETY: the range is within memory that is borrowed mutably, and the advice changes no byte of it.
            let advised = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
            // A kernel without large pages keeps small ones.
            let _ = advised;
        }
    }

    /// Lets the system take the pages. Elements may become zero at any time until they are written.
    pub(crate) fn release_pages<T: Pod>(memory: &mut [T]) {
        if let Some((start, bytes)) = whole_pages(memory) {
            // SAFETY: the range is within memory that is borrowed mutably. Its elements become zeros now or later,
            // which are valid bits of every `T: Pod`. The caller exposes no element before it is written, and a page
            // that has been written keeps its bytes.
            let advised = unsafe { madvise(start, bytes, Advice::LinuxFree) };
            // A system without this advice keeps the pages.
            let _ = advised;
        }
    }

    /// Leaves the pages out of processes that are forked, or lets them in again.
    #[cfg(feature = "cuda")]
    pub(crate) fn keep_from_children<T: Pod>(memory: &mut [T], yes: bool) {
        if let Some((start, bytes)) = whole_pages(memory) {
            let advice = if yes { Advice::LinuxDontFork } else { Advice::LinuxDoFork };
            // SAFETY: the range is within memory that is borrowed mutably. A child has no reference to it that it uses:
            // devices cannot be used after a fork.
            let advised = unsafe { madvise(start, bytes, advice) };
            // Old kernels share the pages with children.
            let _ = advised;
        }
    }

    /// Returns the whole pages within some memory, if they are [`LARGE`].
    fn whole_pages<T: Pod>(memory: &mut [T]) -> Option<(*mut std::ffi::c_void, usize)> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(memory);
        let before = bytes.as_ptr().align_offset(PAGE);
        let whole = bytes.len().checked_sub(before)? / PAGE * PAGE;
        let bytes = bytes.get_mut(before..before + whole).filter(|bytes| bytes.len() >= LARGE)?;
        Some((bytes.as_mut_ptr().cast(), bytes.len()))
    }
}

/// Does nothing on this system.
#[cfg(not(target_os = "linux"))]
pub(crate) fn use_large_pages<T>(_: &mut [T]) {}

/// Does nothing on this system.
#[cfg(all(feature = "cuda", not(target_os = "linux")))]
pub(crate) fn keep_from_children<T>(_: &mut [T], _: bool) {}

/// Does nothing on this system: the memory stays allocated.
#[cfg(not(target_os = "linux"))]
pub(crate) fn release_pages<T>(_: &mut [T]) {}
