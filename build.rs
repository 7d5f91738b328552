//! Compiles `kernels/*.cu` for every GPU since 2018 and drivers since CUDA 12.0, if the feature `cuda` is on.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, thread};

const KERNELS: [&str; 5] = ["update", "look", "blend", "gather", "replay"];

/// Architectures that get machine code. That of 8.0 also runs on 8.6 and 8.9, that of 10.0 on 10.3, and that of 12.0 on
/// 12.1.
const ARCHITECTURES: [u32; 5] = [75, 80, 90, 100, 120];

/// Architecture whose PTX serves later GPUs. That of 7.5 has no instructions for bf16.
const LATER: u32 = 80;

/// PTX version that drivers of CUDA 12.0 take. nvcc writes its own version, whose newer parts the kernels do not use:
/// `kernels/check_ptx.py` assembles them by CUDA 12.0.
const OLD_PTX: &str = "8.0";

/// Newest architecture in that version.
const NEWEST_IN_OLD_PTX: u32 = 90;

/// Variable that overrides [`ARCHITECTURES`], as `90` or `80,90`: one architecture compiles in a quarter of the time.
const ARCHITECTURES_VARIABLE: &str = "POSTHOC_EMA_CUDA_ARCHS";

/// Variables that cap how many vectors of an average, or how many snapshots, a thread loads at a time: to compare.
const UNROLL_VARIABLES: [(&str, &str); 2] =
    [("POSTHOC_EMA_CUDA_UPDATE_UNROLL", "UPDATE_UNROLL"), ("POSTHOC_EMA_CUDA_BLEND_UNROLL", "BLEND_UNROLL")];

/// Command that installs all parts in one version. By itself, nvcc's package lets pip choose newer parts that do not
/// fit.
const PIP: &str = "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \
                   'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    let watched = ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "NVCC_CCBIN", "VIRTUAL_ENV", ARCHITECTURES_VARIABLE];
    for variable in watched.into_iter().chain(UNROLL_VARIABLES.map(|(variable, _)| variable)) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    if env::var_os("DOCS_RS").is_some() {
        // docs.rs has no nvcc and runs nothing: empty fatbins are enough.
        for file in KERNELS.iter().flat_map(|kernel| [fatbin(&out, kernel), ptx(&out, kernel)]) {
            fs::write(file, []).unwrap_or_else(|error| fail(&[error.to_string()]));
        }
        return;
    }
    let nvcc = find_nvcc().unwrap_or_else(|tried| fail(&not_found(&tried)));
    let version = version(&nvcc);
    let architectures = architectures(&nvcc);
    let oldest = if old_architecture(&architectures).is_some() { "12.0" } else { &version };
    println!("cargo::rustc-env=POSTHOC_EMA_CUDA_VERSION={version}");
    println!("cargo::rustc-env=POSTHOC_EMA_CUDA_OLDEST={oldest}");
    compile(&nvcc, &version, &architectures, &out);
}

/// Ends the build with a message, without the backtrace of a panic.
fn fail(lines: &[String]) -> ! {
    for line in lines {
        println!("cargo::error={line}");
    }
    exit(1)
}

fn fatbin(out: &Path, kernel: &str) -> PathBuf {
    out.join(format!("{kernel}.fatbin"))
}

fn ptx(out: &Path, kernel: &str) -> PathBuf {
    out.join(format!("{kernel}.ptx"))
}

/// Returns the architecture of the PTX for old drivers; none if all are too new.
fn old_architecture(architectures: &[u32]) -> Option<u32> {
    architectures.iter().min().copied().filter(|arch| *arch <= NEWEST_IN_OLD_PTX)
}

/// Finds the compiler, or returns the places that were searched.
fn find_nvcc() -> Result<PathBuf, Vec<String>> {
    let mut tried = Vec::new();
    if let Some(path) = env::var_os("NVCC").map(PathBuf::from) {
        // An explicit choice never falls through to another compiler.
        return if path.is_file() { Ok(path) } else { Err(vec![format!("NVCC: {} (not there)", path.display())]) };
    }
    let variables = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];
    let homes = variables.iter().filter_map(|v| Some((*v, PathBuf::from(env::var_os(v)?).join("bin"))));
    let path = env::var_os("PATH").unwrap_or_default();
    let paths = env::split_paths(&path).map(|dir| ("PATH", dir));
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/lib/cuda/bin"].map(|dir| ("usual place", dir.into()));
    for (why, dir) in homes.chain(paths).chain(python_packages()).chain(usual) {
        let nvcc = dir.join(format!("nvcc{}", env::consts::EXE_SUFFIX));
        if nvcc.is_file() {
            return Ok(nvcc);
        }
        if why != "PATH" {
            tried.push(format!("{why}: {} (not there)", nvcc.display()));
        }
    }
    tried.push("PATH: no nvcc in any of its folders".to_owned());
    Err(tried)
}

/// Folders to which `pip install nvidia-cuda-nvcc` in the active Python installs the compiler.
fn python_packages() -> Vec<(&'static str, PathBuf)> {
    let code = "import importlib.util as u; s = u.find_spec('nvidia'); \
                print(*(s.submodule_search_locations if s else []), sep='\\n')";
    let mut found = Vec::new();
    for python in ["python3", "python"] {
        let Ok(output) = Command::new(python).args(["-c", code]).output() else { continue };
        for location in String::from_utf8_lossy(&output.stdout).lines().map(str::trim).filter(|line| !line.is_empty()) {
            found.extend(["cu13", "cu14"].map(|cuda| (python, Path::new(location).join(cuda).join("bin"))));
        }
    }
    found
}

fn not_found(tried: &[String]) -> Vec<String> {
    let mut lines = vec!["the feature `cuda` needs CUDA's compiler, nvcc 12.8 or later, and none was found".to_owned()];
    lines.extend(tried.iter().map(|place| format!("  looked at {place}")));
    lines.push(format!("  install CUDA, set NVCC or CUDA_HOME, or: {PIP}"));
    lines.push("  or build without the feature: everything works on the CPU".to_owned());
    lines
}

/// Returns the compiler's version, such as `13.0`. A driver older than its major version does not run its output.
fn version(nvcc: &Path) -> String {
    let output = match Command::new(nvcc).arg("--version").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => fail(&[format!("{} --version: {error}", nvcc.display())]),
    };
    let version = output.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    version.map_or_else(|| fail(&[format!("{} --version prints no version: {output}", nvcc.display())]), str::to_owned)
}

/// Returns the wanted architectures that this compiler knows.
fn architectures(nvcc: &Path) -> Vec<u32> {
    let known = match Command::new(nvcc).arg("--list-gpu-code").output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => fail(&[format!("{} --list-gpu-code: {}", nvcc.display(), output.status)]),
        Err(error) => fail(&[format!("{}: {error}", nvcc.display())]),
    };
    let wanted: Vec<u32> = match env::var(ARCHITECTURES_VARIABLE) {
        Ok(list) => {
            list.split(',').map(|item| item.trim().parse().unwrap_or_else(|_| fail(&[bad_list(&list)]))).collect()
        }
        Err(_) => ARCHITECTURES.to_vec(),
    };
    let is_known = |arch: &u32| known.lines().any(|line| line.trim() == format!("sm_{arch}"));
    let chosen: Vec<u32> = wanted.iter().copied().filter(is_known).collect();
    if chosen.is_empty() {
        let known = known.split_whitespace().collect::<Vec<_>>().join(" ");
        fail(&[format!("{} compiles for none of {wanted:?}: choose among {known}", nvcc.display())]);
    }
    chosen
}

fn bad_list(list: &str) -> String {
    format!("{ARCHITECTURES_VARIABLE}={list}: give a list of architectures, such as 80,90")
}

/// Compiles all files in parallel.
fn compile(nvcc: &Path, version: &str, architectures: &[u32], out: &Path) {
    let outcomes: Vec<Result<(), String>> = thread::scope(|scope| {
        let fatbins =
            KERNELS.map(|kernel| scope.spawn(move || compile_fatbin(nvcc, version, architectures, kernel, out)));
        let ptx = KERNELS.map(|kernel| scope.spawn(move || compile_ptx(nvcc, architectures, kernel, out)));
        let running: Vec<_> = fatbins.into_iter().chain(ptx).collect();
        running.into_iter().map(|job| job.join().unwrap_or_else(|_| Err("the build script panicked".into()))).collect()
    });
    let errors: Vec<String> = outcomes.into_iter().filter_map(Result::err).collect();
    if !errors.is_empty() {
        let lines = errors.iter().flat_map(|text| text.lines().map(str::to_owned));
        let versions = "  `Unsupported .version` from ptxas means that parts of several CUDA versions are mixed: ";
        fail(&lines.chain([format!("{versions}{PIP}")]).collect::<Vec<_>>());
    }
}

/// Compiles machine code of every architecture, and PTX for later ones.
fn compile_fatbin(nvcc: &Path, version: &str, architectures: &[u32], kernel: &str, out: &Path) -> Result<(), String> {
    let mut arguments = vec!["-fatbin".to_owned()];
    // Drivers of CUDA 12 before 550 do not know the smaller compression.
    let compression = if version.starts_with("12.") { "-Xfatbin=-compress-all" } else { "--compress-mode=size" };
    arguments.push(compression.to_owned());
    for arch in architectures {
        arguments.extend(["-gencode".to_owned(), format!("arch=compute_{arch},code=sm_{arch}")]);
    }
    let oldest = architectures.iter().min().copied().unwrap_or(LATER);
    let later = architectures.iter().copied().filter(|arch| *arch >= LATER).min().unwrap_or(oldest);
    arguments.extend(["-gencode".to_owned(), format!("arch=compute_{later},code=compute_{later}")]);
    run_nvcc(nvcc, &arguments, kernel, &fatbin(out, kernel))
}

/// Compiles PTX for drivers that are older than the compiler; an empty file if there can be none.
fn compile_ptx(nvcc: &Path, architectures: &[u32], kernel: &str, out: &Path) -> Result<(), String> {
    let path = ptx(out, kernel);
    let text = match old_architecture(architectures) {
        None => String::new(),
        Some(arch) => {
            run_nvcc(nvcc, &["-ptx".to_owned(), format!("-arch=compute_{arch}")], kernel, &path)?;
            let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            in_old_version(&text).ok_or_else(|| format!("{}: no line names the version", path.display()))?
        }
    };
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Returns PTX that names [`OLD_PTX`] as its version, without comments and indentation.
fn in_old_version(text: &str) -> Option<String> {
    let mut is_named = false;
    let mut lines = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with("//") && !line.is_empty()) {
        let is_version = line.starts_with(".version ");
        is_named |= is_version;
        lines.push(if is_version { format!(".version {OLD_PTX}") } else { line.to_owned() });
    }
    is_named.then(|| lines.join("\n") + "\n")
}

fn run_nvcc(nvcc: &Path, arguments: &[String], kernel: &str, out: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    // No contraction and no flushing of subnormals, so that results have the CPU's bits.
    command.args(["-std=c++17", "-O3", "-fmad=false", "-ftz=false"]).args(arguments);
    if let Some(compiler) = env::var_os("NVCC_CCBIN") {
        command.arg("-ccbin").arg(compiler);
    }
    for (variable, name) in UNROLL_VARIABLES {
        if let Ok(number) = env::var(variable) {
            if !matches!(number.parse(), Ok(1..=8u32)) {
                fail(&[format!("{variable}={number}: give a number from 1 to 8, or unset it")]);
            }
            command.arg(format!("-D{name}={number}"));
        }
    }
    command.arg("-o").arg(out).arg(format!("kernels/{kernel}.cu"));
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Err(format!("{command:?}\n{}", String::from_utf8_lossy(&text)))
        }
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}
