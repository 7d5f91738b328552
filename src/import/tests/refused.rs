//! Refused imports: the error names the file and the remedy, and the target is unchanged.

use super::pt::{call, legacy};
use super::*;
use crate::error::Error;
use crate::fs::Lock;

fn one(from: Tool) -> Import {
    import(from, &[0.1], 10)
}

/// Returns the error of an import of one file `0.100.pt`.
fn refusal(bytes: &[u8]) -> String {
    let temp = tempfile::tempdir().unwrap();
    fs::create_dir(temp.path().join("source")).unwrap();
    fs::write(temp.path().join("source/0.100.pt"), bytes).unwrap();
    let target = temp.path().join("run");
    let text = one(Tool::PytorchPosthocEma).write(temp.path().join("source"), &target, None).unwrap_err().to_string();
    assert!(text.contains("0.100.pt: "), "the file is named: {text}");
    assert!(!target.exists(), "{text}");
    text
}

fn sound() -> Pt {
    Pt::with_step(1).floats("w", &[1.0, 2.0])
}

#[test]
fn damaged_files_are_refused() {
    let whole = sound().archive();
    for bytes in [&b""[..], b"text", b"PK\x03\x04", b"\x80\x02}.", b"\x80\x02}", &legacy(b"\x80\x02]."), &[0xff; 4000]]
    {
        let text = refusal(bytes);
        assert!(text.contains("damaged or incomplete; move it out"), "{text}");
    }
    for length in (0..whole.len()).step_by(11) {
        refusal(&whole[..length]);
    }
    // A flipped bit may go unnoticed, but never does more harm than an error.
    for bit in (0..8 * whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("0.100.pt"), bytes).unwrap();
        let _ = one(Tool::PytorchPosthocEma).write(temp.path(), temp.path().join("run"), None);
    }
}

#[test]
fn code_is_refused_and_never_run() {
    let temp = tempfile::tempdir().unwrap();
    let trace = temp.path().join("trace");
    let command = format!("touch {}", trace.display());
    let code = call("posix", "system", &command);
    let nested = [b"}(X\x01\0\0\0a", &code[..], b"u"].concat();
    let listed = [b"](", &code[..], b"e"].concat();
    let text = refusal(&sound().entry("config", &code).archive());
    assert!(text.contains("`config` is a Python object (`posix.system`), whose code is never run"), "{text}");
    // Within a plain value it is beside the model, and does not matter.
    for value in [&nested, &listed] {
        let source = temp.path().join("source");
        fs::create_dir_all(&source).unwrap();
        sound().entry("config", value).save(source.join("0.100.pt"));
        let run = temp.path().join("run");
        let report = one(Tool::PytorchPosthocEma).write(&source, &run, None).unwrap();
        assert_eq!(report.warnings, ["the entry `config` is left out: it is not a tensor"]);
        fs::remove_dir_all(run).unwrap();
    }
    for pickle in [[b"\x80\x02", &code[..], b"."].concat(), sound().entry("a", &code).pickle()] {
        refusal(&pickle);
        refusal(&legacy(&pickle));
        refusal(&Pt::default().entry("x", &pickle).archive());
    }
    // A call with a tensor as its argument, such as that of a sparse one.
    let text = refusal(
        &sound().entry("sparse", b"ctorch._utils\n_rebuild_sparse_tensor\n(ctorch\nFloatStorage\ntR").archive(),
    );
    assert!(text.contains("sparse"), "{text}");
    assert!(!trace.exists());
}

#[test]
fn compressed_and_oversized_files_are_refused() {
    let ones = [1; 65];
    let bytes = 1f32.to_le_bytes();
    let mut packed = sound().archive();
    let directory = packed.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    packed[directory + 10] = 8;
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    for (bytes, part) in [
        (packed, "`archive/data.pkl` is compressed"),
        (tar, "a TAR archive"),
        (
            sound().strided("deep", "FloatStorage", 1, &ones, &ones, &bytes).archive(),
            "tensor `deep`: it has more than 64 dimensions",
        ),
        (sound().strided("wide", "FloatStorage", 1, &[1 << 20], &[0], &bytes).archive(), "its tensors take 41943"),
    ] {
        let text = refusal(&bytes);
        assert!(text.contains(part), "{text}");
    }
    // A few elements may be repeated.
    let temp = tempfile::tempdir().unwrap();
    sound().strided("row", "FloatStorage", 1, &[1000], &[0], &bytes).save(temp.path().join("0.100.pt"));
    one(Tool::PytorchPosthocEma).write(temp.path(), temp.path().join("run"), None).unwrap();
}

#[test]
fn irregular_files_are_not_opened() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("0.100.pt");
    let refused = || {
        let text =
            one(Tool::PytorchPosthocEma).write(temp.path(), temp.path().join("run"), None).unwrap_err().to_string();
        assert!(text.contains("0.100.pt: this is not a regular file"), "{text}");
    };
    fs::create_dir(&path).unwrap();
    refused();
    fs::remove_dir(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    refused();
}

#[test]
fn invalid_checkpoints_are_refused_with_the_reason() {
    let long = |step: i64| step.to_le_bytes();
    let bare = || Pt::default().floats("w", &[1.0]);
    for (pt, part) in [
        (bare(), "not a checkpoint of pytorch-posthoc-ema: it lacks `step` and `initted`"),
        (Pt::with_step(1), "no tensor of a model"),
        (sound().floats("x", &[1.0, f32::NAN]), "tensor `x` holds NaN at element 1"),
        (sound().floats("x", &[f32::NEG_INFINITY]), "tensor `x` holds -inf at element 0"),
        (sound().tensor("h", "HalfStorage", &[2], &[0, 0, 0, 0x7c]), "tensor `h` holds inf at element 1"),
        (sound().tensor("c", "ComplexFloatStorage", &[1], &[0; 8]), "`c` is a tensor of C64, which cannot be averaged"),
        (
            sound().tensor("c", "ComplexDoubleStorage", &[1], &[0; 16]),
            "`c` is a tensor that is not read (`ComplexDouble",
        ),
        (Pt::with_step(100).floats("w", &[1.0]), "update_after_step 100: 0 would fit"),
        (Pt::with_step(51).floats("w", &[1.0]), "update_after_step 100: 50 would fit"),
        (Pt::with_step(0).floats("w", &[1.0]), "its `step` is 0, and at step 100 it would be 1"),
        (Pt::with_step(-7).floats("w", &[1.0]), "its `step` is -7"),
        (
            bare().tensor("initted", "BoolStorage", &[], &[0]).tensor("step", "LongStorage", &[], &long(1)),
            "no average had begun",
        ),
        (
            bare().tensor("initted", "BoolStorage", &[], &[1]).tensor("step", "LongStorage", &[2], &[0; 16]),
            "a single number",
        ),
        (
            bare().tensor("initted", "BoolStorage", &[], &[1]).tensor("step", "HalfStorage", &[], &[0, 0x7e]),
            "`step` is NaN",
        ),
        (
            bare().tensor("initted", "BoolStorage", &[], &[1]).tensor("step", "HalfStorage", &[], &[0x40, 0x56]),
            "about 0 would fit",
        ),
    ] {
        let text = refusal(&pt.archive());
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn files_of_another_tool_are_refused() {
    for (case, from, owner) in [
        ("ramp", Tool::EmaPytorch, "pytorch-posthoc-ema"),
        ("prefixed", Tool::NitrousEma, "pytorch-posthoc-ema"),
        ("ema", Tool::NitrousEma, "ema-pytorch"),
        ("nitrous", Tool::PytorchPosthocEma, "nitrous-ema"),
    ] {
        let text = usual(from).write(fixture(case), "/nonexistent/run", None).unwrap_err().to_string();
        assert!(text.contains(&format!("laid out as those of {owner}")) && text.contains(".pt: "), "{text}");
    }
}

/// All of a model may be in `ema_model`, but such a file is much more likely one of ema-pytorch.
#[test]
fn files_that_two_tools_could_have_written_warn() {
    let usual = usual(Tool::PytorchPosthocEma);
    let text = usual.write(fixture("ema"), "/nonexistent/run", None).unwrap_err().to_string();
    assert!(text.contains("laid out as those of ema-pytorch: import it as such"), "{text}");
    let (_temp, _, report) = imported(&Import { update_after_step: Some(0), ..usual }, &fixture("ema"));
    assert!(report.warnings.iter().any(|text| text.contains("as ema-pytorch has them")), "{report:?}");
}

#[test]
fn options_that_contradict_the_files_are_refused() {
    let ramp = usual(Tool::PytorchPosthocEma);
    let after = |step| Import { update_after_step: Some(step), ..ramp.clone() };
    let many = import(Tool::PytorchPosthocEma, &[0.05, 0.1, 0.28], 10);
    for (options, part) in [
        (
            after(0),
            "0.1000.pt: its `step` is 901, and at step 1000 it would be 1000 with update_after_step 0: 100 would fit",
        ),
        (after(5000), "0.1000.pt: its `step` is 901, and at step 1000 it would be 0 with update_after_step 5000: 100"),
        (import(Tool::PytorchPosthocEma, &[0.05], 10), "1.1000.pt: this is an average of profile 1"),
        (many, "no checkpoint of profile 2"),
    ] {
        let text = options.write(fixture("ramp"), "/nonexistent/run", None).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    let after = Import { update_after_step: Some(200), ..import(Tool::PytorchPosthocEma, &[0.1, 0.25], 20) };
    let text = after.write(fixture("halves"), "/nonexistent/run", None).unwrap_err().to_string();
    assert!(text.contains("with update_after_step 200: about 100 would fit"), "{text}");
}

#[test]
fn inconsistent_options_are_refused() {
    let usual = usual(Tool::EmaPytorch);
    for (options, part) in [
        (Import { update_every: 0, ..usual.clone() }, "option update_every: 0"),
        (Import { update_after_step: Some(1), ..usual.clone() }, "ema-pytorch has no such option"),
        (Import { step_size_correction: true, ..usual.clone() }, "option step_size_correction"),
        (Import { profiles: vec![], ..usual.clone() }, "none is given"),
        (Import { profiles: powers(&[0.1, 0.1]), ..usual.clone() }, "given twice"),
        (Import { profiles: vec![Profile::beta(0.9).unwrap()], ..usual }, "power-function profiles only"),
    ] {
        let error = options.write(fixture("ema"), "/nonexistent/run", None).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }) && error.to_string().contains(part), "{error}");
    }
    for tool in Tool::ALL {
        assert_eq!(tool.name().parse(), Ok(tool));
    }
    assert!("torch".parse::<Tool>().unwrap_err().contains("nitrous-ema"));
}

#[test]
fn checkpoints_of_different_models_are_refused() {
    for (pt, part) in [
        (
            Pt::with_step(11).floats("w", &[1.0]).floats("more", &[1.0]),
            "0.110.pt: tensor `more` is present, but missing in",
        ),
        (Pt::with_step(11).floats("v", &[1.0]), "0.110.pt: tensor `v` is present, but missing in"),
        (Pt::with_step(11).floats("w", &[1.0, 2.0]), "0.110.pt: the shape of tensor `w` is [2], but [1] in"),
        (
            Pt::with_step(11).tensor("w", "HalfStorage", &[1], &[0, 0]),
            "0.110.pt: the dtype of tensor `w` is F16, but F32 in",
        ),
        (Pt::with_step(11), "holds no tensor of a model"),
    ] {
        let temp = tempfile::tempdir().unwrap();
        Pt::with_step(1).floats("w", &[1.0]).save(temp.path().join("0.100.pt"));
        pt.save(temp.path().join("0.110.pt"));
        let text =
            one(Tool::PytorchPosthocEma).write(temp.path(), temp.path().join("run"), None).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("0.110.pt"), "{text}");
    }
    // A missing tensor.
    let temp = tempfile::tempdir().unwrap();
    Pt::with_step(1).floats("w", &[1.0]).floats("x", &[1.0]).save(temp.path().join("0.100.pt"));
    Pt::with_step(11).floats("w", &[1.0]).save(temp.path().join("0.110.pt"));
    let text = one(Tool::PytorchPosthocEma).write(temp.path(), temp.path().join("run"), None).unwrap_err().to_string();
    assert!(text.contains("0.110.pt: tensor `x` is missing, but present in"), "{text}");
}

#[test]
fn unusable_sources_and_targets_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let empty = temp.path().join("empty");
    let file = temp.path().join("file");
    fs::create_dir(&empty).unwrap();
    fs::write(&file, "").unwrap();
    let (_other, run, _) = imported(&usual(Tool::EmaPytorch), &fixture("ema"));
    let ema = fixture("ema");
    for (source, target, part) in [
        (&empty, &run.join("x"), "no checkpoint is in it (INDEX.STEP.pt"),
        (&temp.path().join("none"), &empty, "check the path"),
        (&ema, &ema, "name another one for the run"),
        (&ema, &run, "already holds a run (0.201.safetensors)"),
        (&ema, &file, "no run here (it is not a directory)"),
        (&ema, &file.join("run"), "cannot create"),
        (&ema, &PathBuf::from("/proc/run"), "cannot create /proc/run"),
    ] {
        let text = usual(Tool::EmaPytorch).write(source, target, None).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // A directory with a tracker's lock is not empty.
    let lock = Lock::acquire(&empty).unwrap();
    let text = usual(Tool::EmaPytorch).write(&ema, &empty, None).unwrap_err().to_string();
    assert!(text.contains("the directory is not empty (`.lock`): name an empty or a new one"), "{text}");
    drop(lock);
    fs::remove_file(empty.join(".lock")).unwrap();
    usual(Tool::EmaPytorch).write(&ema, &empty, None).unwrap();
}

#[test]
fn failed_import_leaves_the_target_unchanged() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    fs::create_dir(&source).unwrap();
    Pt::with_step(1).floats("w", &[1.0]).save(source.join("0.100.pt"));
    Pt::with_step(11).floats("w", &[f32::NAN]).save(source.join("0.110.pt"));
    let fail = |target: &Path| {
        let error = one(Tool::PytorchPosthocEma).write(&source, target, None).unwrap_err();
        assert!(error.to_string().contains("0.110.pt: tensor `w` holds NaN"), "{error}");
    };
    fail(&temp.path().join("deep/run"));
    assert!(!temp.path().join("deep").exists());
    // An existing directory stays, and is still empty.
    let target = temp.path().join("run");
    fs::create_dir(&target).unwrap();
    fail(&target);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
    fs::remove_file(source.join("0.110.pt")).unwrap();
    one(Tool::PytorchPosthocEma).write(&source, &target, None).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
}

/// Another process writes to the directory while the import reads.
#[test]
fn target_filled_by_another_process_is_kept() {
    let temp = tempfile::tempdir().unwrap();
    let target = temp.path().join("run");
    let intrude = |_| {
        let _ = fs::create_dir(&target);
        fs::write(target.join("mine"), "").unwrap();
    };
    let error = usual(Tool::EmaPytorch).write(fixture("ema"), &target, Some(&intrude)).unwrap_err();
    assert!(error.to_string().contains("cannot rename into place"), "{error}");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

/// Fails each step of the writing in turn, and expects an error and no trace of the run.
#[test]
fn failure_at_any_step_leaves_no_run() {
    let import = usual(Tool::PytorchPosthocEma);
    for first in 0.. {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("made/run");
        let fault = crate::fs::fail_point::Fault::within(temp.path(), first..first + 1, 28);
        let written = import.write(fixture("ramp"), &dir, None);
        let struck = fault.steps() > first;
        drop(fault);
        assert_eq!(written.is_err(), struck, "{written:?}");
        let Err(error) = written else {
            assert!(first > 100 && Run::open(&dir).is_ok(), "{first} steps");
            return;
        };
        let text = error.to_string();
        assert!(text.contains("No space left") && text.contains(temp.path().to_str().unwrap()), "{text}");
        // After the rename the run is there, whole; only the sync of its directory failed.
        let left = fs::read_dir(temp.path()).unwrap().count();
        assert!(left == 0 || crate::verify(&dir, &mut |_| ()).unwrap().findings.is_empty(), "step {first}");
    }
}
