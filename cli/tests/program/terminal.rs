//! Text on a terminal: names cannot forge it, and colours are for terminals only.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use posthoc_ema::is_control;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::common::{posthoc_ema, train};

/// Characters that change the direction of text or end a line, and an escape sequence that clears the screen.
const FORGED: &str = "a\u{202e}b\u{2066}c\u{2067}d\u{2069}e\u{200f}f\u{2028}g\u{2029}h\u{61c}\u{1b}[2J\n\nok";

/// Runs a command, and returns both outputs after a check that they hold lines of plain characters.
fn plain(arguments: &[&str]) -> String {
    let output = posthoc_ema(arguments);
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(!text.is_empty() && !text.chars().any(|c| is_control(c) && c != '\n'), "{}", text.escape_debug());
    assert!(!text.lines().any(|line| line.starts_with("ok")), "{arguments:?} prints a line of a name: {text}");
    text
}

#[test]
fn names_of_tensors_and_profiles_cannot_forge_lines() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().to_str().unwrap();
    let metadata = json!({"posthoc_ema": "1", "step": "10", "profile": FORGED});
    let tensor = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    for header in [json!({FORGED: tensor}), json!({FORGED: tensor, "__metadata__": metadata})] {
        let header = header.to_string();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
        fs::write(temp.path().join("0.10.safetensors"), bytes).unwrap();
        for command in [&["inspect"][..], &["inspect", "--json"], &["verify"], &["plan", "--sigma-rel=0.1"]] {
            plain(&[command, &[dir]].concat());
        }
    }
}

#[test]
fn names_of_files_cannot_forge_lines() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join(FORGED);
    train(&dir);
    // A snapshot that was not finished: the library logs a warning that names the directory.
    fs::write(dir.join("0.600-00001-of-00002.safetensors"), "").unwrap();
    let dir = dir.to_str().unwrap();
    let out = temp.path().join(format!("{FORGED}.safetensors"));
    let out = out.to_str().unwrap();
    assert!(plain(&["inspect", dir]).contains("WARN"));
    let outputs = temp.path().join(format!("out{FORGED}"));
    let outputs = outputs.to_str().unwrap();
    for command in [
        &["synthesize", dir, "--sigma-rel=0.1", "-o", out][..],
        &["synthesize", dir, "--sigma-rel=0.1,0.2", "--out-dir", outputs],
        &["synthesize", dir, "--sigma-rel=0.1", "--json", "-o", out],
        &["synthesize", dir, "--sigma-rel=0.1", "--skip-damaged", "-o", out],
        &[
            "sweep",
            dir,
            "--sigma-rel=0.1",
            "--refine=0",
            "--eval=: {}; echo 1",
            "--out-dir",
            &format!("{outputs}-sweep"),
        ],
        &["verify", dir],
        &["plan", "--sigma-rel=0.1", &format!("{dir}-missing")],
        &["synthesize", dir, "--sigma-rel=0.1", "-o", outputs],
        // Errors of the arguments.
        &["inspect", &format!("--{FORGED}")],
        &[FORGED],
        &["synthesize", dir, "--sigma-rel", FORGED],
        &["plan", "--sigma-rel=0.1", &format!("--steps=1{FORGED}")],
        &["average", dir, "--uniform=2", "-o", out, &format!("--device={FORGED}")],
    ] {
        plain(command);
    }
}

#[test]
fn names_of_checkpoints_cannot_forge_lines() {
    let temp = tempfile::tempdir().unwrap();
    let paths = [10, 20].map(|step| {
        let path = temp.path().join(format!("{FORGED}-{step}.safetensors"));
        let view = TensorView::new(safetensors::Dtype::F32, vec![2], &[0; 8]).unwrap();
        fs::write(&path, safetensors::serialize([(FORGED, view)], None).unwrap()).unwrap();
        path.to_str().unwrap().to_owned()
    });
    let [first, second] = paths.each_ref().map(String::as_str);
    for rest in [
        &["--uniform=20", "--steps=10,20"][..],
        &["--uniform=20", "--steps=1,1"],
        &["--uniform=90", "--steps=10,20"],
        &["--uniform=20", "--steps=10,20", "--json"],
    ] {
        plain(&[&["average", first, second, "--plan"], rest].concat());
    }
}

/// Returns the output of a shell command whose outputs are a terminal, or `None` if no terminal can be made here.
fn on_terminal(script: &str, variables: &[(&str, &str)]) -> Option<String> {
    let script = script.replace("posthoc-ema", env!("CARGO_BIN_EXE_posthoc-ema"));
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &script, "/dev/null"]);
    command.env_remove("NO_COLOR").env("TERM", "xterm-256color").envs(variables.iter().copied());
    let output = command.stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    if text.is_empty() {
        println!("skipped: no terminal can be made here");
        return None;
    }
    Some(text)
}

#[test]
fn colours_are_for_terminals_only() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    fs::write(dir.join("0.600-00001-of-00002.safetensors"), "").unwrap();
    let inspect = format!("posthoc-ema inspect {}", dir.display());
    let commands = ["posthoc-ema --help", "posthoc-ema synthesize", "posthoc-ema --no-such-option", &inspect];
    for command in commands {
        let arguments: Vec<&str> = command.split(' ').skip(1).collect();
        let text = plain(&arguments);
        assert!(command != inspect || text.contains("WARN"), "{text}");
        // As a terminal without colours.
        if let Some(text) = on_terminal(command, &[("NO_COLOR", "1")]) {
            assert!(!text.contains('\u{1b}'), "{command}: {}", text.escape_debug());
        }
    }
    if let Some(text) = on_terminal(commands[0], &[]) {
        assert!(text.contains('\u{1b}'), "{}", text.escape_debug());
    }
}

#[test]
fn weights_are_not_sent_to_a_terminal() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    for path in ["-", "/dev/stdout", "/dev/stderr", "/dev/fd/1"] {
        let command = format!("posthoc-ema synthesize {} --sigma-rel=0.1 -o {path}; echo status $?", dir.display());
        let Some(text) = on_terminal(&command, &[]) else { return };
        assert!(text.contains("this is a terminal: send the weights into a pipe or a file"), "{path}: {text}");
        assert!(text.contains("status 1") && !text.contains("of snapshots read"), "{path}: {text}");
    }
    assert_eq!(fs::read_dir(Path::new(temp.path())).unwrap().count(), 1);
}
