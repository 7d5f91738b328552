//! The layers of the architecture, held by a look at the sources.

use std::fs;
use std::path::{Path, PathBuf};

/// Every Rust file below a folder of `src`, or the one file of that name.
fn sources(part: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(part);
    let mut files = Vec::new();
    let mut folders = vec![root];
    while let Some(path) = folders.pop() {
        if path.is_dir() {
            folders.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            files.push((path, text));
        }
    }
    assert!(!files.is_empty(), "{part} has moved: move the rule along");
    files
}

/// The lines of a file that are no comment.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

fn assert_without(part: &str, words: &[&str]) {
    for (path, text) in sources(part) {
        for line in code(&text) {
            for word in words {
                assert!(!line.contains(word), "{}: `{word}` in: {line}", path.display());
            }
        }
    }
}

#[test]
fn mathematics_files_and_arithmetic_do_not_use_each_other() {
    let others = [
        "crate::tracker",
        "crate::synthesis",
        "crate::average",
        "crate::sweep",
        "crate::bench",
        "crate::report",
        "crate::import",
    ];
    assert_without("math", &[&others[..], &["crate::snapshot", "crate::compute", "std::fs", "std::path"]].concat());
    assert_without("snapshot", &[&others[..], &["crate::math", "crate::compute"]].concat());
    assert_without("compute", &[&others[..], &["crate::math", "crate::snapshot"]].concat());
}

#[test]
fn what_everything_shares_uses_nothing() {
    for part in ["error.rs", "tensor.rs"] {
        assert_without(
            part,
            &[
                "crate::math",
                "crate::snapshot",
                "crate::compute",
                "crate::tracker",
                "crate::synthesis",
                "crate::average",
                "crate::bench",
                "crate::import",
                "crate::sweep",
            ],
        );
    }
}

#[test]
fn synthesis_does_not_know_the_tracker() {
    let above = ["crate::average", "crate::sweep", "crate::bench", "crate::report", "crate::import"];
    assert_without("synthesis", &[&above[..], &["crate::tracker"]].concat());
    assert_without("tracker", &above);
}

#[test]
fn a_sweep_joins_synthesis_and_files_and_computes_nothing() {
    assert_without("sweep", &["crate::tracker", "crate::compute", "crate::bench", "crate::report", "crate::import"]);
}

#[test]
fn an_import_joins_files_and_chains_and_computes_nothing() {
    assert_without("import", &["crate::tracker", "crate::compute", "crate::bench", "crate::report"]);
}

#[test]
fn averages_of_checkpoints_compute_nothing_and_need_no_run() {
    assert_without("average", &["crate::tracker", "crate::compute", "crate::bench", "crate::report", "crate::cli"]);
}

#[test]
fn only_the_foreign_files_read_those_of_pytorch() {
    for (path, text) in sources("") {
        let foreign = path.to_str().unwrap().contains("/snapshot/foreign");
        assert!(foreign || !code(&text).any(|line| line.contains("pytorch_reader")), "{}", path.display());
    }
}

/// Pictures are drawn on one sheet and stored in one place: what they are made with is known there only.
#[test]
fn only_the_sheet_and_the_file_of_pictures_name_their_libraries() {
    for (library, place) in [("plotters", "src/report/canvas.rs"), ("resvg", "src/report/file.rs")] {
        for (path, text) in sources("") {
            let own = path.ends_with(place);
            assert!(own || !code(&text).any(|line| line.contains(library)), "{}: {library}", path.display());
        }
    }
}

#[test]
fn what_measures_the_machine_knows_no_runs() {
    assert_without("bench", &["crate::math", "crate::tracker", "crate::report", "crate::import"]);
}

#[test]
fn the_command_line_uses_only_what_is_public() {
    assert_without("cli", &["posthoc_ema::compute", "unsafe"]);
    assert_without("main.rs", &["posthoc_ema::"]);
}

#[test]
fn unsafe_code_is_in_compute_and_the_mapping_only() {
    for part in [
        "math",
        "tracker",
        "synthesis",
        "sweep",
        "average",
        "import",
        "bench",
        "report",
        "error.rs",
        "tensor.rs",
        "lib.rs",
        "main.rs",
    ] {
        assert_without(part, &["unsafe"]);
    }
    let blocks: Vec<PathBuf> = sources("snapshot")
        .into_iter()
        .filter(|(_, text)| code(text).any(|l| l.contains("unsafe")))
        .map(|f| f.0)
        .collect();
    assert!(blocks.len() == 1 && blocks[0].ends_with("snapshot/mapping.rs"), "{blocks:?}");
}

/// The binding to Python takes tensors by address in one place.
#[test]
fn unsafe_code_of_the_binding_is_in_the_lending_only() {
    for (path, text) in sources("../python/src") {
        let lends = path.ends_with("lend.rs");
        assert!(lends || !code(&text).any(|line| line.contains("unsafe")), "{}", path.display());
    }
}

#[test]
fn only_the_cuda_half_of_compute_names_cudarc() {
    for (path, text) in sources("") {
        let within = path.to_str().unwrap().contains("/compute/cuda");
        assert!(within || !code(&text).any(|line| line.contains("cudarc")), "{}", path.display());
    }
}
