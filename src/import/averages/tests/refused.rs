//! Options and files from which no run can be made, each refused with the remedy.

use super::*;
use crate::import::tests::pt::Pt;

fn refused(import: &ImportAverages, temp: &TempDir) -> String {
    let out = temp.path().join("out");
    let run = temp.path().join("run");
    let error = import.open(&out).and_then(|found| found.write(&run, None)).unwrap_err().to_string();
    assert!(!run.exists());
    error
}

#[test]
fn missing_and_contradicting_options_are_named() {
    let temp = files(&EmaLoop::constant(0.9), &[10, 20, 30]);
    let usual = options(EmaDecay::constant(0.9), 1);
    let power = AverageDecay::Power(Profile::beta(0.9).unwrap());
    let both = vec![AverageDecay::Ema(EmaDecay::constant(0.9)), AverageDecay::Power(Profile::gamma(5.0).unwrap())];
    let keys = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect::<Vec<_>>();
    for (import, parts) in [
        (ImportAverages { decays: Vec::new(), ..usual.clone() }, ["option beta", "do not record the decay"]),
        (ImportAverages { update_every: None, ..usual.clone() }, ["option update_every", "do not record it"]),
        (ImportAverages { update_every: Some(0), ..usual.clone() }, ["option update_every", "0"]),
        (options(EmaDecay::constant(1.5), 1), ["option beta", "below 1"]),
        (ImportAverages { decays: vec![power], ..usual.clone() }, ["option sigma_rels", "not a power-function"]),
        (ImportAverages { decays: both.clone(), ..usual.clone() }, ["option beta", "2 decays are given for 1"]),
        (ImportAverages { keys: keys(&["a"]), decays: both.clone(), ..usual.clone() }, ["option key", "2 decays"]),
        (ImportAverages { keys: keys(&["a", "a"]), decays: both, ..usual.clone() }, ["option key", "named twice"]),
        (ImportAverages { keys: keys(&["a"]), ..usual.clone() }, ["ema-10", "has no entry `a`"]),
        (ImportAverages { update_after_step: Some(15), ..usual.clone() }, ["ema-10", "before the first update"]),
        (ImportAverages { update_every: Some(25), ..usual.clone() }, ["ema-10", "before the first update"]),
        (
            ImportAverages { update_every: Some(10), steps: Some(vec![10, 20, 25]), ..usual.clone() },
            ["ema-30", "as that of"],
        ),
        (ImportAverages { steps: Some(vec![1]), ..usual.clone() }, ["option steps", "1 are given for 3"]),
        (ImportAverages { copy: vec!["v".into()], ..usual }, ["option copy", "matches no tensor"]),
    ] {
        let error = refused(&import, &temp);
        assert!(parts.iter().all(|part| error.contains(part)), "{import:?}: {error}");
    }
}

#[test]
fn values_that_are_not_finite_are_refused_and_can_be_copied() {
    let temp = tempfile::tempdir().unwrap();
    for step in [10, 20] {
        let mask = if step == 20 { f64::INFINITY } else { 1.0 };
        save_two(&temp.path().join(format!("out/ema-{step}.safetensors")), f64::from(step), mask);
    }
    let import = options(EmaDecay::constant(0.9), 1);
    let error = refused(&import, &temp);
    assert!(error.contains("ema-20") && error.contains("`buffer` holds inf at element 0"), "{error}");
    let (dir, _) = imported(&ImportAverages { copy: vec!["buffer".into()], ..import }, &temp);
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::beta(0.95).unwrap(), At::Latest).unwrap();
    assert_eq!(run.load(&plan).unwrap().get("buffer").unwrap().to_vec::<f64>().unwrap(), [f64::INFINITY]);
}

#[test]
fn epochs_in_names_are_not_steps() {
    let temp = tempfile::tempdir().unwrap();
    save_averages(&temp, &EmaLoop::constant(0.9), &[10, 20], &|step| format!("ema_epoch{step}.safetensors"));
    let error = refused(&options(EmaDecay::constant(0.9), 1), &temp);
    assert!(error.contains("10 is the number of an epoch") && error.contains("--steps"), "{error}");
}

#[test]
fn several_entries_with_weights_must_be_named() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    for step in [10, 20] {
        let pt = Pt::default().nested("teacher", "w", &[1.0]).nested("student", "w", &[step as f32]);
        pt.save(out.join(format!("step{step}.pt")));
    }
    let import = options(EmaDecay::constant(0.9), 1);
    let error = refused(&import, &temp);
    assert!(error.contains("option key: `teacher` and `student` hold weights"), "{error}");
    let import = ImportAverages { keys: vec!["teacher".into()], raw: Some("student".into()), ..import };
    let (_, report) = imported(&import, &temp);
    assert_eq!(report.snapshots, 4);
}

/// A buffer is the same in the average and the raw weights, and changes.
#[test]
fn copied_tensors_are_found_by_their_elements() {
    let temp = tempfile::tempdir().unwrap();
    for step in [10_u64, 20, 30] {
        for (name, w) in [("ema", step as f64 / 2.0), ("raw", step as f64)] {
            let path = temp.path().join(format!("out/step-{step}/{name}/model.safetensors"));
            save_two(&path, w, step as f64);
        }
    }
    let usual = options(EmaDecay::constant(0.9), 1);
    let import = ImportAverages { keys: vec!["ema".into()], raw: Some("raw".into()), ..usual };
    let (dir, report) = imported(&import, &temp);
    assert!(report.warnings[0].contains("copied, not averaged: `buffer`"), "{:?}", report.warnings);
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.averaged(), ["w"]);
}

/// Saves a parameter and a buffer.
fn save_two(path: &Path, w: f64, buffer: f64) {
    let (w, buffer) = (w.to_le_bytes(), buffer.to_le_bytes());
    let view = |bytes| TensorView::new(safetensors::Dtype::F64, vec![1], bytes).unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    safetensors::serialize_to_file([("w", view(&w)), ("buffer", view(&buffer))], None, path).unwrap();
}

/// A mask is part of the model, and the same in every average.
#[test]
fn infinities_that_all_averages_share_stay() {
    let temp = tempfile::tempdir().unwrap();
    let minus = f64::NEG_INFINITY;
    for step in [10_u64, 20, 30] {
        let path = temp.path().join(format!("out/step-{step}.safetensors"));
        save(&path, [minus, step as f64, f64::INFINITY]);
    }
    let import = options(EmaDecay::constant(0.9), 1);
    let (dir, report) = imported(&import, &temp);
    assert_eq!(report.snapshots, 3);
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.2).unwrap(), At::Latest).unwrap();
    let values = run.load(&plan).unwrap().get("w").unwrap().to_vec::<f64>().unwrap();
    assert!(values[0] == minus && values[1].is_finite() && values[2] == f64::INFINITY, "{values:?}");
    fs::remove_dir_all(&dir).unwrap();
    // One that is only in an average of its own.
    let odd = temp.path().join("out/step-20.safetensors");
    save(&odd, [minus, minus, f64::INFINITY]);
    let error = import.open(temp.path().join("out")).unwrap().write(&dir, None).unwrap_err().to_string();
    assert!(error.contains("step-20") && error.contains("holds -inf at element 1"), "{error}");
    save(&odd, [minus, f64::NAN, f64::INFINITY]);
    let error = import.open(temp.path().join("out")).unwrap().write(&dir, None).unwrap_err().to_string();
    assert!(error.contains("step-20") && error.contains("holds NaN at element 1"), "{error}");
}

#[test]
fn settings_of_config_files_that_may_differ_are_ignored() {
    let temp = tempfile::tempdir().unwrap();
    for step in [10_u64, 20] {
        let folder = temp.path().join(format!("out/step-{step}"));
        save(&folder.join("model.safetensors"), [step as f64; ELEMENTS]);
        fs::write(folder.join("config.json"), format!(r#"{{"hidden_act": "{step}"}}"#)).unwrap();
    }
    let import = options(EmaDecay::constant(0.9), 1);
    let error = refused(&import, &temp);
    assert!(error.contains("hidden_act"), "{error}");
    let import = ImportAverages { ignore_config: vec!["hidden_*".into()], ..import };
    assert_eq!(imported(&import, &temp).1.snapshots, 2);
}
