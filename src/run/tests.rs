//! Tests of runs with the metadata of other tools, and of failing outputs.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::*;
use crate::math::Profile;
use crate::planning::profile_json;
use crate::snapshot::{Meta, Session, SnapshotId, write_snapshot};
use crate::tensor::TensorSpec;

fn write(dir: &Path, index: usize, step: u64, profile: &Profile, history: Option<String>) {
    write_with(dir, index, Meta { profile: profile_json(profile), step, history, ..Meta::default() });
}

fn write_with(dir: &Path, index: usize, meta: Meta) {
    let step = meta.step;
    let spec = TensorSpec { name: "w".into(), dtype: Dtype::F32, shape: vec![2] };
    let fill = |_: usize, range: std::ops::Range<usize>, dst: &mut [u8]| {
        let values = [step as f32, 1.0];
        dst.copy_from_slice(&bytemuck::cast_slice(&values)[range]);
    };
    write_snapshot(dir, SnapshotId { index, step }, vec![spec], &meta, u64::MAX, &fill).unwrap();
}

fn power(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

/// Compares plans from files with the golden chains of another tool.
#[test]
fn plans_of_foreign_chains_match_golden() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/data/plans.json")).unwrap();
    let case = &golden["foreign"][0];
    let dir = tempfile::tempdir().unwrap();
    for step in (1..=20).map(|i| 1000 * i) {
        let history = format!(r#"{{"updates":[[100,{step},10]],"decay":{{"kind":"counter","stride":10,"offset":2}}}}"#);
        write(dir.path(), 0, step, &power(0.05), Some(history.clone()));
        write(dir.path(), 1, step, &power(0.28), Some(history));
    }
    let run = Run::open(dir.path()).unwrap();
    assert_eq!(run.profiles(), BTreeMap::from([(0, &power(0.05)), (1, &power(0.28))]));
    for target in case["targets"].as_array().unwrap() {
        let plan = run.plan(power(target["profile"]["sigma_rel"].as_f64().unwrap()), At::Latest).unwrap();
        let gain = target["noise_gain"].as_f64().unwrap();
        for (weight, expected) in plan.weights.iter().zip(target["weights"].as_array().unwrap()) {
            let difference = (weight.weight - expected.as_f64().unwrap()).abs();
            assert!(difference <= 1e-9 * gain, "{}.{}: {difference}", weight.index, weight.step);
        }
        assert_eq!(plan.weights.len(), 40);
    }
}

#[test]
fn snapshots_without_history_count_as_dense() {
    let dir = tempfile::tempdir().unwrap();
    for step in (1..=20).map(|i| 1000 * i) {
        write(dir.path(), 0, step, &power(0.05), None);
        write(dir.path(), 1, step, &power(0.28), None);
    }
    let run = Run::open(dir.path()).unwrap();
    assert!(run.history().is_none());
    let plan = run.plan(power(0.15), At::Step(12_000)).unwrap();
    assert!(plan.relative_error < 0.05 && (plan.sum - 1.0).abs() < 1e-12, "{plan:?}");
    let weights = run.load(&plan).unwrap();
    assert_eq!(weights.get("w").unwrap().to_vec::<f32>().unwrap()[1], 1.0);
    let text = run.plan(Profile::beta(0.99).unwrap(), At::Latest).unwrap_err().to_string();
    assert!(text.contains("no history of updates"), "{text}");
}

#[test]
fn invalid_metadata_is_named() {
    let uniform = Profile::uniform(crate::math::Window::Steps(10.0)).unwrap();
    let beta = Profile::beta(0.9).unwrap();
    let counter = r#"{"updates":[[10,100,10]],"decay":{"kind":"counter","stride":10,"offset":2}}"#;
    let corrected = r#"{"updates":[[10,100,10]],"decay":{"kind":"corrected-counter","stride":0,"offset":2}}"#;
    let unknown = r#"{"updates":[[10,100,10]],"decay":{"kind":"spiral","stride":10,"offset":2}}"#;
    for (profile, history, part) in [
        (&uniform, "[[10,100,10]]", "no running average can track"),
        (&power(0.1), "[[10,105,10]]", "whole strides"),
        (&power(0.1), "[[10,90,10]]", "ends at step 90, not at the snapshot's step 100"),
        (&power(0.1), "[[10,", "`history` cannot be parsed"),
        (&power(0.1), "{}", "missing field `updates`"),
        (&beta, counter, "needs a power-function profile and a stride above 0"),
        (&power(0.1), corrected, "needs a power-function profile and a stride above 0"),
        (&power(0.1), unknown, "unknown variant `spiral`"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, 100, profile, Some(history.into()));
        let text = Run::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("0.100.safetensors"), "{text}");
    }
}

#[test]
fn diverged_histories_are_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0, 100, &power(0.1), Some("[[10,100,10]]".into()));
    write(dir.path(), 0, 200, &power(0.1), Some("[[20,200,20]]".into()));
    let text = Run::open(dir.path()).unwrap_err().to_string();
    let found = "0.100.safetensors: the history of updates is of one training (last step 100), but of another \
                 (last step 200) in ";
    assert!(text.contains(found) && text.contains("0.200.safetensors: the two files are not of one run"), "{text}");
}

/// Makes each operation of the writing fail in turn. The error names the file, the previous file is untouched, and no
/// temporary file is left.
#[test]
fn failed_outputs_leave_previous_files_untouched() {
    let dir = tempfile::tempdir().unwrap();
    for step in (1..=5).map(|i| 1000 * i) {
        write(dir.path(), 0, step, &power(0.05), None);
    }
    let run = Run::open(dir.path()).unwrap();
    let plans = [0.04, 0.05].map(|sigma_rel| run.plan(power(sigma_rel), At::Latest).unwrap());
    let mut tried = 0;
    for first in 0.. {
        let temp = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| temp.path().join(name));
        std::fs::write(&paths[0], "before").unwrap();
        let fault = crate::fs::fail_point::Fault::within(temp.path(), first..first + 1, 28);
        let outputs = [0, 1].map(|i| Output { plan: &plans[i], path: &paths[i] });
        let written = run.write_all(&outputs, &WriteOptions::default());
        let injected = fault.steps() > first;
        drop(fault);
        assert_eq!(written.is_err(), injected, "{written:?}");
        let mut names: Vec<_> =
            std::fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let whole = |path: &Path| crate::snapshot::StoredFile::open(path).is_ok();
        match written {
            Ok(_) => {
                assert!(names == ["a", "b"] && paths.iter().all(|path| whole(path)), "{names:?}");
                break;
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("No space left") && text.contains(temp.path().to_str().unwrap()), "{text}");
                // The first output may be complete already.
                assert!(std::fs::read(&paths[0]).unwrap() == b"before" || whole(&paths[0]), "step {first}");
                assert!(!paths[1].exists() || whole(&paths[1]), "step {first}");
                assert!(names.iter().all(|name| name == "a" || name == "b"), "{names:?}");
            }
        }
        tried += 1;
    }
    assert!(tried >= 8, "{tried} steps");
}

/// Writes a snapshot for each triple of step, session and step at which the session began. Session 0 stores none.
fn write_sessions(dir: &Path, snapshots: &[(u64, (u64, &str), u64)]) {
    for &(step, (number, id), from) in snapshots {
        let session = (number > 0).then(|| Session { number, id: id.into(), from });
        let profile = profile_json(&power(0.05));
        write_with(dir, 0, Meta { profile, step, session, ..Meta::default() });
    }
}

#[test]
fn resumed_sessions_are_one_run() {
    let (old, first, second, third) = ((0, ""), (1, "a"), (2, "b"), (4, "c"));
    for snapshots in [
        vec![(10, first, 0), (20, first, 0), (30, first, 0)],
        // The second session completed step 20 as the first, or stored the step from which it began.
        vec![(10, first, 0), (20, first, 0), (30, second, 20), (40, third, 35)],
        vec![(10, first, 0), (20, second, 20), (30, second, 20)],
        // Older versions wrote some of the snapshots.
        vec![(10, old, 0), (20, first, 10), (30, old, 0), (40, second, 30)],
        vec![(10, old, 0), (20, old, 0)],
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_sessions(dir.path(), &snapshots);
        assert_eq!(Run::open(dir.path()).unwrap().snapshots().len(), snapshots.len());
        let found = verify(dir.path(), &mut |_| ()).unwrap().findings;
        assert!(found.is_empty(), "{snapshots:?}: {found:?}");
    }
}

#[test]
fn sessions_at_one_time_are_found() {
    let (first, second, other, third) = ((1, "a"), (2, "b"), (2, "c"), (3, "d"));
    for (snapshots, strays) in [
        // The first session goes on after the second has begun.
        (vec![(10, first, 0), (20, first, 0), (30, second, 10), (40, second, 10)], vec![20]),
        (vec![(10, first, 0), (20, second, 10), (30, first, 0), (40, second, 10)], vec![30]),
        (vec![(10, first, 0), (20, second, 10), (30, first, 0)], vec![30]),
        // Both resumed from one state.
        (vec![(10, first, 0), (20, second, 10), (30, other, 10), (40, second, 10)], vec![30]),
        // The third continues the second, and the first still writes.
        (vec![(10, first, 0), (20, second, 10), (30, first, 0), (40, third, 25), (50, first, 0)], vec![30, 50]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_sessions(dir.path(), &snapshots);
        let text = Run::open(dir.path()).unwrap_err().to_string();
        let named = format!("0.{}.safetensors", strays[0]);
        assert!(text.contains("two processes wrote this run") && text.contains(&named), "{text}");
        let found = verify(dir.path(), &mut |_| ()).unwrap().findings;
        assert!(found.len() == 1 && found[0].to_string() == text, "{found:?}");
        let (sound, left_out) = Run::open_sound(dir.path(), &mut |_| ()).unwrap();
        assert_eq!(left_out.len(), strays.len(), "{left_out:?}");
        let kept: Vec<u64> = sound.snapshots().iter().map(|snapshot| snapshot.id.step).collect();
        let expected: Vec<u64> = snapshots.iter().map(|(step, ..)| *step).filter(|s| !strays.contains(s)).collect();
        assert_eq!(kept, expected, "{snapshots:?}");
    }
}
