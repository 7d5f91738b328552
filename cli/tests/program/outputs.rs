//! Outputs of every kind: pipes, sockets and devices are never replaced, and streams are written to.

use std::fs::{self, FileType};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use posthoc_ema::PostHocEma;
use posthoc_ema::{Checkpoints, Output as RunOutput, Run, WriteOptions};

use crate::common::{failure, load, names, posthoc_ema, run, stdout};

/// Makes one kind of file at a path. Returns false if that is not permitted here.
type Make = fn(&Path) -> bool;

fn run_tool(tool: &str, path: &Path, rest: &[&str]) -> bool {
    Command::new(tool).arg(path).args(rest).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Kinds that a file must not replace. Devices are made in the test's own folder, never the system's.
const KINDS: [(&str, Make); 4] = [
    ("pipe", |path| run_tool("mkfifo", path, &[])),
    ("socket", |path| UnixListener::bind(path).is_ok()),
    ("device", |path| run_tool("mknod", path, &["c", "1", "3"])),
    ("device", |path| run_tool("mknod", path, &["b", "7", "200"])),
];

/// Returns the type of what is at a path, without following links.
fn file_type(path: &Path) -> FileType {
    fs::symlink_metadata(path).unwrap().file_type()
}

/// Calls `check` with each kind of file at `path`, and with a link to it there.
fn with_each_kind(path: &Path, mut check: impl FnMut(&str)) {
    let place = tempfile::tempdir().unwrap();
    for (kind, make) in KINDS {
        let real = place.path().join("real");
        for through_link in [false, true] {
            let made = if through_link { &real } else { &path.to_owned() };
            if !make(made) {
                println!("skipped: a {kind} cannot be made here");
                continue;
            }
            if through_link {
                symlink(&real, path).unwrap();
            }
            let before = (file_type(made), file_type(path));
            check(kind);
            assert_eq!((file_type(made), file_type(path)), before, "{kind} was replaced");
            fs::remove_file(made).unwrap();
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes two checkpoints of one tensor, and returns their paths.
fn checkpoints(dir: &Path) -> [String; 2] {
    [10, 20].map(|step| {
        let path = dir.join(format!("model-{step}.safetensors"));
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &[0; 8]).unwrap();
        fs::write(&path, safetensors::serialize([("w", view)], None).unwrap()).unwrap();
        path.to_str().unwrap().to_owned()
    })
}

/// Every option that names an output is refused before anything is printed, evaluated or written.
#[test]
fn pipes_sockets_and_devices_are_not_replaced() {
    let (temp, dir) = run();
    let [first, second] = checkpoints(temp.path());
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    let [file, picture, entry] = ["x.safetensors", "x.svg", "sigma_rel-0.1.step-500.safetensors"].map(|n| out.join(n));
    let [file_text, picture_text, out_text] = [&file, &picture, &out].map(|path| path.to_str().unwrap());
    let marker = temp.path().join("evaluated");
    let eval = format!("touch {}; : {{}}; echo 1", marker.display());
    let calls: [(&Path, &[&str]); 8] = [
        (&file, &["synthesize", &dir, "--sigma-rel=0.1", "-o", file_text]),
        (&entry, &["synthesize", &dir, "--sigma-rel=0.1", "--out-dir", out_text]),
        (&file, &["average", &first, &second, "--uniform=20", "--steps=10,20", "-o", file_text]),
        (&picture, &["plan", &dir, "--sigma-rel=0.1", "--plot", picture_text]),
        (&picture, &["error", &dir, "--plot", picture_text]),
        (&picture, &["inspect", &dir, "--plot", picture_text]),
        (&picture, &["bench", "--plot", picture_text]),
        (&picture, &["sweep", &dir, "--sigma-rel=0.1", "--eval", &eval, "--out-dir", out_text, "--plot", picture_text]),
    ];
    for (path, call) in calls {
        with_each_kind(path, |kind| {
            let (status, text) = failure(call);
            assert!(status == 1 && text.contains(&format!("this is a {kind}")), "{call:?}: {text}");
            assert!(text.contains(path.to_str().unwrap()) && text.contains("name another file"), "{call:?}: {text}");
            assert_eq!(names(&out), [path.file_name().unwrap().to_str().unwrap()], "{call:?}");
        });
    }
    assert!(!marker.exists());
}

/// The record and the best average of a sweep. An earlier sweep has marked the directory as its own.
#[test]
fn files_of_a_sweep_do_not_replace_devices() {
    let (temp, dir) = run();
    let out = temp.path().join("sweep");
    let marker = temp.path().join("evaluated");
    let eval = format!("touch {}; : {{}}; echo 1", marker.display());
    let rest = ["--sigma-rel=0.1", "--refine=0", "--eval", &eval, "--out-dir", out.to_str().unwrap()];
    let sweep = || posthoc_ema(&[&["sweep", &dir], &rest[..]].concat());
    for name in ["best.safetensors", "sweep.json"] {
        assert!(sweep().status.success());
        fs::remove_file(&marker).unwrap();
        let path = out.join(name);
        fs::remove_file(&path).unwrap();
        with_each_kind(&path, |_| {
            let output = sweep();
            let text = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.code() == Some(1) && text.contains(name), "{text}");
        });
        assert!(!marker.exists());
        fs::remove_dir_all(&out).unwrap();
    }
}

/// A directory that is to hold outputs, or to become a run.
#[test]
fn directories_of_outputs_are_not_made_over_devices() {
    let (temp, dir) = run();
    let [first, second] = checkpoints(temp.path());
    let out = temp.path().join("out");
    let out_text = out.to_str().unwrap();
    let source = temp.path().join("source");
    fs::create_dir(&source).unwrap();
    let calls: [&[&str]; 4] = [
        &["synthesize", &dir, "--sigma-rel=0.1", "--out-dir", out_text],
        &["average", &first, &second, "--steps=10,20", "--uniform=20", "--out-dir", out_text],
        &["sweep", &dir, "--sigma-rel=0.1", "--eval", ": {}; echo 1", "--out-dir", out_text],
        &["import", source.to_str().unwrap(), out_text, "--from=ema-pytorch", "--update-every=1", "--gammas=5,9"],
    ];
    for call in calls {
        with_each_kind(&out, |_| {
            let (status, text) = failure(call);
            assert!(status == 1 && !text.contains("panic"), "{call:?}: {text}");
        });
    }
    // A tracker, too.
    with_each_kind(&out, |_| {
        assert!(PostHocEma::options(&out).create(&vec![("w", vec![0.0f32; 4])]).is_err());
    });
}

/// The library under `write` and `average` of Python.
#[test]
fn library_refuses_all_outputs_before_the_first_is_written() {
    let (temp, dir) = run();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(posthoc_ema::Profile::sigma_rel(0.1).unwrap(), posthoc_ema::At::Latest).unwrap();
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    // More than fit in one pass.
    let paths: Vec<PathBuf> = (0..300).map(|i| out.join(format!("{i}.safetensors"))).collect();
    let outputs: Vec<RunOutput<'_>> = paths.iter().map(|path| RunOutput { plan: &plan, path }).collect();
    let [first, second] = checkpoints(temp.path());
    let checkpoints = Checkpoints::open(&[first, second], Some(&[10, 20])).unwrap();
    let merges = checkpoints.plans(&[posthoc_ema::Profile::sigma_rel(0.1).unwrap()], posthoc_ema::At::Latest).unwrap();
    let averages: Vec<_> = paths.iter().map(|path| (&merges[0], path.as_path())).collect();
    with_each_kind(&paths[299], |kind| {
        for text in [
            run.write_all(&outputs, &WriteOptions::default()).unwrap_err().to_string(),
            checkpoints.write(&averages, &WriteOptions::default()).unwrap_err().to_string(),
        ] {
            assert!(text.contains("299.safetensors: this is a ") && text.contains(kind), "{text}");
        }
        assert_eq!(names(&out), ["299.safetensors"]);
    });
}

/// A link is replaced as a file is, and what it leads to stays as it is: blobs of Hugging Face's cache are named after
/// their contents.
#[test]
fn link_is_replaced_and_its_target_is_untouched() {
    let (temp, dir) = run();
    let [target, link, loose] = ["blob", "link.safetensors", "loose.safetensors"].map(|name| temp.path().join(name));
    fs::write(&target, "contents").unwrap();
    symlink(&target, &link).unwrap();
    symlink(temp.path().join("missing"), &loose).unwrap();
    for path in [&link, &loose] {
        stdout(&["synthesize", &dir, "--sigma-rel=0.1", "-o", path.to_str().unwrap()]);
        assert!(file_type(path).is_file() && load(path).len() == 2);
    }
    assert_eq!(fs::read(&target).unwrap(), b"contents");
    assert!(!temp.path().join("missing").exists());
}

/// Runs a shell command in which `$0` is the program, `$1` a run and `$2` a path.
fn shell(script: &str, dir: &str, path: &Path) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_posthoc-ema"), dir]).arg(path).output().unwrap()
}

#[test]
fn dash_and_descriptors_get_the_bytes_of_a_file() {
    let (temp, dir) = run();
    let [file, sent] = ["a.safetensors", "sent"].map(|name| temp.path().join(name));
    stdout(&["synthesize", &dir, "--sigma-rel=0.1", "-o", file.to_str().unwrap()]);
    let expected = fs::read(&file).unwrap();
    let spool = tempfile::tempdir().unwrap();
    for name in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        let arguments = ["synthesize", &dir, "--sigma-rel=0.1", "-o", name];
        let program = env!("CARGO_BIN_EXE_posthoc-ema");
        let output = Command::new(program).args(arguments).env("TMPDIR", spool.path()).output().unwrap();
        let report = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && output.stdout == expected, "{name}: {report}");
        assert!(report.contains("of snapshots read") && report.contains("sigma_rel 0.1"), "{report}");
        assert!(names(spool.path()).is_empty());
    }
    let synthesize = r#""$0" synthesize "$1" --sigma-rel=0.1"#;
    let after = [b"before\n", expected.as_slice(), b"after\n"].concat();
    for (script, expected) in [
        (format!(r#"{synthesize} -o - > "$2""#), &expected),
        (format!(r#"{synthesize} -o /dev/stdout | cat > "$2""#), &expected),
        (format!(r#"{synthesize} -o /dev/stderr 2> "$2""#), &expected),
        (format!(r#"{synthesize} -o /dev/fd/5 5> "$2""#), &expected),
        (format!(r#"{{ {synthesize} -o /dev/fd/5 5>&1 >&2 | cat > "$2"; }}"#), &expected),
        (format!(r#"{{ echo before; {synthesize} -o -; echo after; }} > "$2""#), &after),
        (format!(r#"echo before > "$2"; {synthesize} -o - >> "$2"; echo after >> "$2""#), &after),
        (format!(r#"echo before > "$2"; {synthesize} -o /dev/fd/5 5>> "$2"; echo after >> "$2""#), &after),
    ] {
        let output = shell(&script, &dir, &sent);
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(fs::read(&sent).unwrap() == *expected, "{script}");
        fs::remove_file(&sent).unwrap();
    }
}

#[test]
fn average_goes_to_stdout_as_one_file() {
    let temp = tempfile::tempdir().unwrap();
    let [first, second] = checkpoints(temp.path());
    let file = temp.path().join("a.safetensors");
    stdout(&["average", &first, &second, "--uniform=20", "--steps=10,20", "-o", file.to_str().unwrap()]);
    // Folders in the form of Hugging Face's tools: one file without the others.
    let folders = [10, 20].map(|step| temp.path().join(format!("checkpoint-{step}")));
    for (folder, path) in folders.iter().zip([&first, &second]) {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
        fs::copy(path, folder.join("model.safetensors")).unwrap();
    }
    let [first_folder, second_folder] = folders.each_ref().map(|path| path.to_str().unwrap());
    for inputs in [[first.as_str(), second.as_str()], [first_folder, second_folder]] {
        let output = posthoc_ema(&[&["average"], &inputs[..], &["--uniform=20", "--steps=10,20", "-o", "-"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == fs::read(&file).unwrap() && !output.stderr.is_empty());
    }
}

#[test]
fn stream_that_cannot_be_sent_is_an_error() {
    let (temp, dir) = run();
    let arguments = ["synthesize", &dir, "--sigma-rel=0.1", "-o", "-"];
    let (status, text) = failure(&[&arguments[..], &["--json"]].concat());
    assert!(status == 2 && text.contains("both write to standard output"), "{text}");

    // The reader has gone away.
    let mut child = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    let mut child = child.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("cannot write /dev/stdout: Broken pipe"), "{text}");

    // No place for the temporary file.
    let missing = temp.path().join("missing");
    let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    let output = command.args(arguments).env("TMPDIR", &missing).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains(missing.to_str().unwrap()), "{text}");
    assert!(output.stdout.is_empty());

    // A descriptor that is not open, or that is read from.
    for script in [
        r#""$0" synthesize "$1" --sigma-rel=0.1 -o /dev/fd/7"#,
        r#"echo | "$0" synthesize "$1" --sigma-rel=0.1 -o /dev/fd/0"#,
    ] {
        let output = shell(script, &dir, temp.path());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains("cannot open /dev/fd/"), "{text}");
    }
}

/// The null device of the system is exchanged for one of the test, in a mount namespace.
#[test]
fn null_device_is_written_to() {
    let (_temp, dir) = run();
    let place = tempfile::tempdir().unwrap();
    let null = place.path().join("null");
    if !run_tool("mknod", &null, &["c", "1", "3"]) {
        println!("skipped: a device cannot be made here");
        return;
    }
    let script = r#"mount --bind "$2" /dev || exit 77; exec "$0" synthesize "$1" --sigma-rel=0.1 -o /dev/null"#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_posthoc-ema"), &dir]).arg(place.path());
    let Some(output) = command.output().ok().filter(|output| output.status.code() != Some(77)) else {
        println!("skipped: no mount namespace here");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if text.contains("unshare") {
        println!("skipped: {text}");
        return;
    }
    assert!(output.status.success(), "{text}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("of snapshots read"));
    assert!(file_type(&null).is_char_device());
    assert_eq!(names(place.path()), ["null"]);
}
