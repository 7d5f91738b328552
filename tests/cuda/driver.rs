//! Driver that the tests run on, and the build of the stand-in.

use std::collections::hash_map::DefaultHasher;
use std::ffi::CString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::{Library, Symbol};

/// Variable with the path of another build of the stand-in: a sanitized or a mutated one.
pub const LIBRARY: &str = "POSTHOC_EMA_STANDIN";

/// Compiler flags of the stand-in. Products and sums are not contracted, as on the GPU.
pub const FLAGS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-Wl,-soname,libcuda.so.1",
];

/// Driver that the tests run on.
pub enum Driver {
    Real,
    StandIn(Library),
}

/// Loads the driver once. Every test calls it first.
pub fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        // SAFETY: loading a driver runs its initialisers only.
        let load = |path: &Path| unsafe { Library::new(path) };
        if let Some(path) = std::env::var_os(LIBRARY) {
            return Driver::StandIn(load(path.as_ref()).unwrap());
        }
        match load("libcuda.so.1".as_ref()) {
            Ok(real) => {
                std::mem::forget(real);
                Driver::Real
            }
            // It has the driver's SONAME, so later requests for libcuda.so.1 get the loaded library.
            Err(_) => Driver::StandIn(load(&standin()).unwrap()),
        }
    })
}

/// Returns a counter of the stand-in, such as `launches`, or none on a real device.
pub fn count(what: &str) -> Option<u64> {
    let Driver::StandIn(library) = driver() else { return None };
    // SAFETY: the stand-in declares the function with this type.
    let count: Symbol<'_, unsafe extern "C" fn(*const i8) -> u64> = unsafe { library.get(b"standin_count") }.unwrap();
    let what = CString::new(what).unwrap();
    // SAFETY: the string ends with 0 and lives for the call.
    Some(unsafe { count(what.as_ptr().cast()) })
}

/// Lets a stream of the stand-in be busy for some nanoseconds.
pub fn work(stream: usize, nanoseconds: u64) {
    let Driver::StandIn(library) = driver() else { return };
    // SAFETY: the stand-in declares the function with this type, and the stream exists.
    unsafe {
        let work: Symbol<'_, unsafe extern "C" fn(usize, u64)> = library.get(b"standin_work").unwrap();
        work(stream, nanoseconds);
    }
}

/// Returns the nanoseconds for which waits for events have held a stream of the stand-in up.
pub fn stalled(stream: usize) -> u64 {
    let Driver::StandIn(library) = driver() else { return 0 };
    // SAFETY: as in `work`.
    unsafe {
        let stalled: Symbol<'_, unsafe extern "C" fn(usize) -> u64> = library.get(b"standin_stalled").unwrap();
        stalled(stream)
    }
}

/// Returns the root of the repository, for the tests of `posthoc-ema` and of `posthoc-ema-cli`.
fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    if own.join("kernels").is_dir() { own } else { own.parent().unwrap() }
}

/// Returns the stand-in, built if its sources have changed.
pub fn standin() -> PathBuf {
    build(&root().join("kernels"), &[])
}

/// Builds the stand-in from a folder of kernels.
pub fn build(kernels: &Path, flags: &[&str]) -> PathBuf {
    let tests = root().join("tests/standin");
    let mut hasher = DefaultHasher::new();
    (FLAGS, flags).hash(&mut hasher);
    for folder in [kernels, &tests] {
        let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().for_each(|file| fs::read(file).unwrap().hash(&mut hasher));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("standin-{:016x}", hasher.finish()));
    let library = folder.join("libcuda.so.1");
    // One build at a time in this process. Another process that builds the same sources creates the same file.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if library.is_file() {
        return library;
    }
    fs::create_dir_all(&folder).unwrap();
    let unfinished = folder.join(format!("unfinished-{}", std::process::id()));
    let mut compiler = Command::new("g++");
    compiler.args(FLAGS).args(flags);
    if cfg!(target_arch = "x86_64") {
        // Fused multiply-adds are instructions instead of calls of a function.
        compiler.arg("-mfma");
    }
    compiler.arg("-I").arg(kernels).arg("-I").arg(&tests).arg("-o").arg(&unfinished).arg(tests.join("driver.cpp"));
    let output = compiler.output().expect("a C++ compiler (g++) builds the stand-in driver");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&unfinished, &library).unwrap();
    library
}

/// Checks that an ignored test passes in its own process, on the stand-in, with additional variables.
pub fn check_in_own_process(test: &str, variables: &[(&str, &str)]) {
    if !is_standin() {
        return;
    }
    let output = run_in_own_process(test, variables, &standin());
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

/// Runs a test in its own process on a library and returns its output.
///
/// A name that ends with `::` stands for all tests below it that are not ignored.
pub fn run_in_own_process(test: &str, variables: &[(&str, &str)], library: &Path) -> std::process::Output {
    let mut process = Command::new(std::env::current_exe().unwrap());
    let one: &[&str] = if test.ends_with("::") { &[] } else { &["--exact", "--include-ignored", "--nocapture"] };
    process.arg(test).args(one).env(LIBRARY, library);
    process.env("LD_LIBRARY_PATH", library.parent().unwrap());
    process.envs(variables.iter().copied()).output().unwrap()
}

/// Returns true if the driver is the stand-in.
pub fn is_standin() -> bool {
    matches!(driver(), Driver::StandIn(_))
}
