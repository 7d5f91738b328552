//! Names of shared libraries.

/// Returns the names and paths of the NVIDIA driver's library, in the order in which they are tried.
///
/// The names come in the order of cudarc, which then finds the library that is loaded already. WSL does not always have
/// its folder in the linker's path.
pub fn driver_libraries() -> &'static [&'static str] {
    if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"] }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// cudarc tries these names first, so it must find the library under one of them.
    #[test]
    fn driver_is_searched_under_its_names_and_in_the_folder_of_wsl() {
        let wsl = driver_libraries().iter().position(|name| *name == "/usr/lib/wsl/lib/libcuda.so.1");
        assert_eq!(wsl, if cfg!(windows) { None } else { Some(2) });
    }
}
