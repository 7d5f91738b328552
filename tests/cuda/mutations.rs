//! Tests that wrong kernels fail the tests, and that the right ones pass under the address sanitizer.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::driver::{build, is_standin, run_in_own_process};

/// Fault in a kernel: its name, the file, the old and the new text, and the tests that must fail.
struct Mutation(&'static str, &'static str, &'static str, &'static str, &'static str);

const MUTATIONS: [Mutation; 22] = [
    Mutation(
        "an unfused product",
        "update.cu",
        "e = fma_f32(w, sub_f32(p, e), e);",
        "e = add_f32(w * sub_f32(p, e), e);",
        "update::",
    ),
    Mutation(
        "a lost low-order term",
        "update.cu",
        "Term::encode(s, sub_f32(d, sub_f32(s, e)), threshold)",
        "0",
        "update::",
    ),
    Mutation("a dropped tail", "update.cu", "    if (i >= c.elements) return;", "    return;", "update::"),
    Mutation(
        "one vector too many",
        "update.cu",
        "vectors = c.elements / V;",
        "vectors = (c.elements + V - 1) / V;",
        "update::",
    ),
    Mutation("unaligned vectors", "update.cu", "if (c.address % Alignment<T, V>::BYTES == 0)", "if (true)", "update::"),
    Mutation(
        "the weight of another profile",
        "update.cu",
        "update_vector(a.weights[FIRST + j]",
        "update_vector(a.weights[j]",
        "update::",
    ),
    Mutation(
        "sums in f32",
        "blend.cu",
        "sum[m][v] = fma_f64(a.weights[(k + u) * M + m], value, sum[m][v]);",
        "sum[m][v] = f64_to_f32(fma_f64(a.weights[(k + u) * M + m], value, sum[m][v]));",
        "blend::",
    ),
    Mutation("sums restarted at 0", "blend.cu", "a.first ? 0.0 : load(sum_at(a, m, i + v))", "0.0", "blend::"),
    Mutation("an overflow is ignored", "blend.cu", "if (!fits(sum[m][v], a.limit))", "if (false)", "blend::"),
    Mutation(
        "the last source left out",
        "blend.cu",
        "if constexpr (U > 1) AddSources",
        "if constexpr (U > 2) AddSources",
        "blend::",
    ),
    Mutation("a run that ends early", "blend.cu", "end = a.ends[r];", "end = a.ends[r] - 1;", "blend::"),
    Mutation(
        "a profile left out",
        "update.cu",
        "N = PROFILES * (GROUP + 1) / GROUPS - FIRST;",
        "N = PROFILES / GROUPS;",
        "update::",
    ),
    Mutation(
        "bytes left behind",
        "chunk.cuh",
        "i = rest + halves * 2 + threadIdx.x; i < bytes;",
        "i = rest + halves * 2 + threadIdx.x; i + 1 < bytes;",
        "offload::",
    ),
    Mutation(
        "a term without its threshold",
        "numbers.cuh",
        "(f32_bits(sum) + threshold) >> 6",
        "f32_bits(sum) >> 6",
        "update::",
    ),
    Mutation(
        "a term without its sign",
        "numbers.cuh",
        "static_cast<int32_t>(static_cast<int16_t>(bits))",
        "bits",
        "update::",
    ),
    Mutation(
        "the exponent of the value before the update",
        "update.cu",
        "Term::encode(s, sub",
        "Term::encode(e, sub",
        "update::",
    ),
    Mutation(
        "an update with NaN is done",
        "update.cu",
        "    if (load(a.found) != NOTHING_FOUND) return;",
        "",
        "non_finite::",
    ),
    Mutation("a prepared replay stays so", "replay.cu", "    store(&a.replay->found, NOT_DUE);", "", "graphs::"),
    Mutation("one weight for all profiles", "update.cu", "load(a.weights + j)", "load(a.weights)", "graphs::"),
    Mutation(
        "a device that ignores the others",
        "look.cu",
        "!= NOTHING_FOUND) store(a.found, NOT_DUE);",
        "!= NOTHING_FOUND) {}",
        "spread::",
    ),
    Mutation(
        "no look at the last element",
        "look.cu",
        "i = vectors * V + threadIdx.x; i < c.elements;",
        "i = vectors * V + threadIdx.x; i + 1 < c.elements;",
        "non_finite::",
    ),
    Mutation(
        "infinity passes",
        "look.cu",
        "magnitude<T>(element(p, v)) < Infinity<T>::BITS",
        "magnitude<T>(element(p, v)) <= Infinity<T>::BITS",
        "non_finite::",
    ),
];

#[test]
#[ignore = "builds the stand-in many times: minutes"]
fn every_mutated_kernel_fails_its_tests() {
    if !is_standin() {
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for Mutation(name, file, from, to, tests) in &MUTATIONS {
        let temp = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(&kernels).unwrap() {
            let path = entry.unwrap().path();
            let mut text = fs::read_to_string(&path).unwrap();
            if path.ends_with(file) {
                assert_eq!(text.matches(from).count(), 1, "{name}: `{from}` has moved");
                text = text.replace(from, to);
            }
            fs::write(temp.path().join(path.file_name().unwrap()), text).unwrap();
        }
        let library = build(temp.path(), &["-O1", "-w"]);
        let output = run_in_own_process(tests, &[], &library);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains("test result: FAILED"), "{name} was not noticed by {tests}");
        fs::remove_dir_all(library.parent().unwrap()).unwrap();
    }
}

/// Device memory of the stand-in is memory of the process, so the sanitizer sees every access outside of it.
#[test]
#[ignore = "builds the stand-in again: a minute"]
fn address_sanitizer_finds_no_fault() {
    if !is_standin() {
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let library = build(&kernels, &["-g", "-O1", "-fsanitize=address", "-w"]);
    // The sanitizer finds the functions of exceptions only if their library is loaded with it.
    let preloaded = ["libasan.so", "libstdc++.so.6"].map(|name| {
        let found = Command::new("g++").arg(format!("-print-file-name={name}")).output().unwrap();
        String::from_utf8(found.stdout).unwrap().trim().to_owned()
    });
    let preloaded = preloaded.join(" ");
    let variables = [("LD_PRELOAD", preloaded.as_str()), ("ASAN_OPTIONS", "detect_leaks=0:halt_on_error=1")];
    for part in ["update::", "blend::", "offload::", "non_finite::", "tracker::", "synthesis::", "graphs::"] {
        let output = run_in_own_process(part, &variables, &library);
        let text = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{part}: {}", String::from_utf8_lossy(&text));
    }
}

/// Runs the stand-in's own tests.
#[test]
#[ignore = "builds the stand-in again: half a minute"]
fn stand_in_passes_its_own_tests() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin");
    let temp = tempfile::tempdir().unwrap();
    let library = temp.path().join("selftest-libcuda.so.1");
    let program = temp.path().join("selftest");
    let compile = |arguments: &[&str], source: &str, out: &Path| {
        let mut compiler = Command::new("g++");
        compiler.args(arguments).arg("-I").arg(&tests).arg("-o").arg(out).arg(tests.join(source));
        let output = compiler.args(["-ldl", "-lpthread"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    compile(&[&crate::driver::FLAGS[..], &["-DSTANDIN_SELFTEST"]].concat(), "driver.cpp", &library);
    compile(&["-std=c++17", "-O1", "-ffp-contract=off"], "selftest.cpp", &program);
    let output = Command::new(&program).arg(&library).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
}
