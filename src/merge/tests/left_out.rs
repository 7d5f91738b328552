//! Files of a folder that are not averaged with the others.

use super::*;
use crate::import::tests::pt::Pt;

/// Saves a checkpoint of timm, whose epochs count from 0.
fn save_timm(path: PathBuf, epoch: u8, value: f32) {
    Pt::default().nested("state_dict", "w", &[value]).entry("epoch", &[b'K', epoch]).save(path);
}

fn opened(paths: &[PathBuf]) -> (Vec<u64>, String) {
    let checkpoints = Checkpoints::open(paths, None).unwrap();
    (checkpoints.steps().to_vec(), checkpoints.notes().join("\n"))
}

#[test]
fn files_within_an_epoch_are_left_out_of_a_folder() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().to_owned();
    let save = |name: &str, epoch: u8, value: f32| save_timm(dir.join(format!("{name}.pth.tar")), epoch, value);
    (0..3).for_each(|epoch| save(&format!("checkpoint-{epoch}"), epoch, f32::from(epoch)));
    save("last", 2, 2.0);
    save("model_best", 1, 1.0);
    for (name, epoch) in [("recovery-2-50", 2), ("recovery-3-100", 3)] {
        save(name, epoch, 9.0);
        let (steps, notes) = opened(std::slice::from_ref(&dir));
        assert_eq!(steps, [1, 2, 3]);
        assert!(notes.contains("left out, saved within an epoch to recover from a crash: `recovery-2-50.pth.tar`"));
        assert!(notes.contains("epochs are counted from 0 in the names, so the first is step 1"), "{notes}");
        assert!(notes.contains("left out, the same as `checkpoint-2.pth.tar`: `last.pth.tar`"), "{notes}");
    }
    // A folder of such files alone.
    let recovery = temp.path().join("recovery");
    fs::create_dir(&recovery).unwrap();
    for batch in [50, 100] {
        save_timm(recovery.join(format!("recovery-3-{batch}.pth.tar")), 3, batch as f32);
    }
    assert_eq!(opened(&[recovery]).0, [50, 100]);
}

#[test]
fn step_0_of_a_training_is_refused_if_it_is_not_an_epoch() {
    let temp = tempfile::tempdir().unwrap();
    for step in 0..3 {
        save(&temp.path().join(format!("step-{step}.safetensors")), &model(step), &[]);
    }
    let error = Checkpoints::open(&[temp.path()], None).unwrap_err().to_string();
    assert!(error.contains("its step is 0, before any training"), "{error}");
}

#[test]
fn averages_of_an_earlier_call_are_left_out() {
    let (temp, paths) = series();
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    let names = ["mean.safetensors", "uniform.step-250.safetensors"];
    for (name, at) in names.iter().zip([At::Latest, At::Step(250)]) {
        let merge = checkpoints.plan(Profile::sigma_rel(0.2).unwrap(), at).unwrap();
        checkpoints.write(&[(&merge, &temp.path().join(name))], &WriteOptions::default()).unwrap();
    }
    let all: Vec<PathBuf> = paths.iter().cloned().chain(names.map(|name| temp.path().join(name))).collect();
    let (steps, notes) = opened(&all);
    assert_eq!(steps, checkpoints.steps());
    assert!(
        notes.contains("left out, an average of such checkpoints itself: `mean.safetensors` and `uniform"),
        "{notes}"
    );
    assert_eq!(opened(&all[paths.len()..]).0, [250, 340]);
}
