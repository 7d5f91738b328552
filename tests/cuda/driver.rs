//! Which driver the tests run on, and the building of the stand-in.

use std::collections::hash_map::DefaultHasher;
use std::ffi::CString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::{Library, Symbol};

/// Chooses another build of the stand-in, by path: a sanitized or a mutated one.
pub const LIBRARY: &str = "POSTHOC_EMA_STANDIN";

/// The flags of the stand-in: no contraction of products and sums, as for the GPU.
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

/// What the tests run on.
pub enum Driver {
    Real,
    StandIn(Library),
}

/// Loads the driver, once. Every test begins with it.
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
            // Its SONAME is the driver's: whoever asks for libcuda.so.1 from now on gets the one that is loaded.
            Err(_) => Driver::StandIn(load(&standin()).unwrap()),
        }
    })
}

/// A counter of the stand-in, such as `launches`; none on a real device.
pub fn count(what: &str) -> Option<u64> {
    let Driver::StandIn(library) = driver() else { return None };
    // SAFETY: the stand-in's header declares it so.
    let count: Symbol<'_, unsafe extern "C" fn(*const i8) -> u64> = unsafe { library.get(b"standin_count") }.unwrap();
    let what = CString::new(what).unwrap();
    // SAFETY: a string that ends with 0 and lives for the call.
    Some(unsafe { count(what.as_ptr().cast()) })
}

/// The top of the repository, above the crate `posthoc-ema-cli` too.
fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    if own.join("kernels").is_dir() { own } else { own.parent().unwrap() }
}

/// The stand-in, built where its sources have changed.
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
    // One build at a time in this process; another process that builds the same one ends with the same file.
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
        // Products and sums of one rounding in hardware, instead of by a function.
        compiler.arg("-mfma");
    }
    compiler.arg("-I").arg(kernels).arg("-I").arg(&tests).arg("-o").arg(&unfinished).arg(tests.join("driver.cpp"));
    let output = compiler.output().expect("a C++ compiler (g++) builds the stand-in driver");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&unfinished, &library).unwrap();
    library
}

/// Runs one ignored test in a process of its own, on the stand-in, with other variables set.
pub fn alone(test: &str, variables: &[(&str, &str)]) {
    if !is_standin() {
        return;
    }
    let output = run_alone(test, variables, &standin());
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

/// As [`alone`], on a library, whatever comes of it. A test whose name ends with `::` stands for all below it that are
/// not ignored.
pub fn run_alone(test: &str, variables: &[(&str, &str)], library: &Path) -> std::process::Output {
    let mut process = Command::new(std::env::current_exe().unwrap());
    let one: &[&str] = if test.ends_with("::") { &[] } else { &["--exact", "--include-ignored", "--nocapture"] };
    process.arg(test).args(one).env(LIBRARY, library);
    process.env("LD_LIBRARY_PATH", library.parent().unwrap());
    process.envs(variables.iter().copied()).output().unwrap()
}

/// Whether the driver is the stand-in.
pub fn is_standin() -> bool {
    matches!(driver(), Driver::StandIn(_))
}
