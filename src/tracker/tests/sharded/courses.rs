//! States of sharded runs in files of the caller's, and courses that go back to them.

use super::*;

/// Returns a folder for a saved state.
fn folder(temp: &TempDir, name: &str) -> PathBuf {
    let path = temp.path().join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

fn save_to(all: &Processes, path: &Path) {
    all.trackers.iter().for_each(|ema| ema.save_to(path).unwrap());
}

fn resume_from(options: &Options, path: &Path, cut: Cut, n: usize) -> Processes {
    Processes::open_with(options, cut, n, |options, model| options.resume_from(path, model))
}

#[test]
fn saved_sets_resume_on_other_processes() {
    let (_a, alone) = scratch();
    twin(options(&alone), 14).finish().unwrap();
    for (to, n) in [(Cut::Columns, 3), (Cut::Whole, 1)] {
        let (temp, dir) = scratch();
        let kept = folder(&temp, "kept");
        let mut all = Processes::open(&options(&dir), Cut::Rows, 4);
        all.train(7);
        save_to(&all, &kept);
        let expected: Vec<String> = (1..=4).map(|i| format!("posthoc-ema-part-0000{i}-of-00004.safetensors")).collect();
        assert_eq!(names(&kept), expected);
        assert_eq!(crate::run::SavedState::at(&kept).unwrap().step, 7);
        // The course that is left has younger snapshots and states.
        all.train(13);
        all.finish();
        if to == Cut::Whole {
            let mut ema = options(&dir).resume_from(&kept, &Shard::new(to, 0, 1, 0)).unwrap();
            assert_eq!(ema.step(), 7);
            train_whole(&mut ema, 14);
            ema.finish().unwrap();
        } else {
            let mut all = resume_from(&options(&dir), &kept, to, n);
            assert_eq!(all.trackers[1].step(), 7);
            all.train(14);
            all.finish();
        }
        assert_same_snapshots(&dir, &alone, &format!("{to:?} on {n}"));
        assert!(!dir.join("aside").exists(), "{:?}", names(&dir));
    }
}

#[test]
fn state_in_one_file_resumes_on_several_processes() {
    let (_a, alone) = scratch();
    twin(options(&alone), 14).finish().unwrap();
    let (temp, dir) = scratch();
    let kept = temp.path().join("kept");
    let mut ema = twin(options(&dir), 7);
    ema.save_to(&kept).unwrap();
    train_whole(&mut ema, 13);
    ema.finish().unwrap();
    drop(ema);
    let mut all = resume_from(&options(&dir), &kept, Cut::Flat, 3);
    all.train(14);
    all.finish();
    assert_same_snapshots(&dir, &alone, "from one file");
}

#[test]
fn state_saved_into_a_new_directory_begins_a_run_there() {
    let (temp, dir) = scratch();
    let (kept, other) = (folder(&temp, "kept"), temp.path().join("other"));
    let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
    all.train(6);
    save_to(&all, &kept);
    all.abandon();
    let all = resume_from(&options(&other), &kept, Cut::Rows, 2);
    assert_eq!(all.trackers[0].step(), 6);
    all.abandon();
    assert_eq!(PostHocEma::saved_step(&other).unwrap(), Some(6));
}

#[test]
fn files_of_two_states_are_refused() {
    let (temp, dir) = scratch();
    let kept = folder(&temp, "kept");
    let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
    all.train(4);
    save_to(&all, &kept);
    all.train(5);
    all.trackers[0].save_to(&kept).unwrap();
    let text = crate::run::SavedState::at(&kept).unwrap_err().to_string();
    assert!(text.contains("step of the state") && text.contains("posthoc-ema-part-0000"), "{text}");
    let text = all.trackers[0].save_to(temp.path().join("file")).unwrap_err().to_string();
    assert!(text.contains("name an existing folder"), "{text}");
    all.abandon();
}
