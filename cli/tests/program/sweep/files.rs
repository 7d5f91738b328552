//! Files of a sweep: candidates, the best averages, and those of others.

use posthoc_ema::SweepOptions;

use super::*;

#[test]
fn directory_of_another_sweep_is_refused() {
    let case = Case::new();
    case.script("");
    case.sweep(&["--sigma-rel", "0.1,0.2", "--refine", "0"]);
    let record = fs::read(case.out.join("sweep.json")).unwrap();
    let other = Case::new();
    let out = case.out.to_str().unwrap();
    let eval = case.eval();
    let longer = format!("{} --all", case.eval());
    for (run, eval, further, part) in [
        (&other.run, &eval, vec![], "over another run"),
        (&case.run, &longer, vec![], "has another evaluation"),
        (&case.run, &eval, vec!["--at", "450"], "at another step (500, and now 450)"),
        (&case.run, &eval, vec!["--maximize"], "has another direction"),
        (&case.run, &eval, vec!["--dtype", "bf16"], "has another dtype"),
    ] {
        let arguments = ["sweep", run, "--eval", eval, "--out-dir", out, "--sigma-rel", "0.15"];
        let (status, text) = failure(&[&arguments[..], &further[..]].concat());
        assert!(status == 1 && text.contains(part) && text.contains("sweep.json"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    assert_eq!(fs::read(case.out.join("sweep.json")).unwrap(), record);
}

#[test]
fn special_characters_in_paths_reach_the_evaluation() {
    let mut case = Case::new();
    case.out = case.temp.path().join("it's a \"$HOME\" `dir`; échec\nof {} *");
    // Checks the path in both arguments and the variable, the profile, and empty stdin.
    case.script(
        "[ \"$1\" = \"$POSTHOC_EMA_WEIGHTS\" ] && [ \"$1\" = \"$2\" ] && [ $# -eq 2 ] || exit 7\n\
         case \"$1\" in /*) ;; *) exit 8;; esac\n\
         case \"$POSTHOC_EMA_PROFILE\" in '{\"gamma\":'*|'{\"kind\":\"power\",'*) ;; *) exit 9;; esac\n\
         [ \"$(cat)\" = '' ] || exit 10",
    );
    let eval = format!("sh {} {{}} \"$POSTHOC_EMA_WEIGHTS\"", case.script.display());
    let out = case.out.to_str().unwrap();
    let output = posthoc_ema(&["sweep", &case.run, "--eval", &eval, "--out-dir", out, "--sigma-rel", "0.1", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success() && document["failed"] == 0, "{document}");
    // A relative path from another directory.
    let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    command.current_dir(case.temp.path()).args(["sweep", "run", "--eval", &eval, "--out-dir=-relative dir"]);
    let output = command.args(["--sigma-rel", "0.1"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(case.temp.path().join("-relative dir/best.safetensors").exists());
}

#[test]
fn keep_all_keeps_every_average() {
    let case = Case::new();
    case.script("");
    let (document, _) = case.sweep(&[&LIST[..], &["--keep-all", "--refine", "2", "--batch", "4"]].concat());
    assert_eq!(document["trials"].as_array().unwrap().len(), 10);
    let kept = names(&case.out.join("candidates"));
    assert_eq!(kept.len(), 10);
    assert_eq!(kept[0], "sigma_rel-0.05.step-500.safetensors");
    assert_eq!(weight(&case.out.join("candidates").join(&kept[0])), case.average(&profile(0.05)));
    let best = serde_json::from_value(document["best"]["profile"].clone()).unwrap();
    assert_eq!(weight(&case.best()), case.average(&best));
    assert_eq!(case.names(), ["best.safetensors", "candidates", "sweep.json"]);
}

/// Targets with equal names have files of their own, and so has a refinement named like an earlier trial.
#[test]
fn targets_with_equal_names_keep_separate_files() {
    let case = Case::new();
    let targets = [0.15, 0.150_000_000_000_01, 0.150_000_000_000_02].map(profile);
    let options = SweepOptions { keep_all: true, refine: 1, ..SweepOptions::new(&case.out, &targets) };
    let run = Run::open(&case.run).unwrap();
    let mut seen = Vec::new();
    let mut evaluate = |candidate: &posthoc_ema::sweep::Candidate<'_>| {
        seen.push((candidate.plan.profile.clone(), candidate.path.to_owned()));
        if candidate.plan.profile == targets[1] { Err("once") } else { Ok(seen.len() as f64) }
    };
    assert_eq!(run.sweep(&options, &mut evaluate).unwrap().sweep.trials().len(), 4);
    // A failed trial is written to its own file again.
    run.sweep(&SweepOptions { refine: 0, ..options }, &mut evaluate).unwrap();
    assert_eq!(seen.len(), 5);
    assert!(seen[4] == seen[1], "{seen:?}");
    assert_eq!(names(&case.out.join("candidates")).len(), 4);
    for (profile, path) in &seen {
        assert_eq!(load(path), run.load(&run.plan(profile.clone(), At::Latest).unwrap()).unwrap());
        let bytes = fs::read(path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let stored: Profile = serde_json::from_str(&header.metadata().as_ref().unwrap()["profile"]).unwrap();
        assert_eq!(stored, *profile);
    }
}

#[test]
fn evaluation_may_remove_its_file() {
    let case = Case::new();
    case.script("");
    let text = fs::read_to_string(&case.script).unwrap();
    fs::write(&case.script, format!("{text}\nrm \"$1\"\n")).unwrap();
    let (document, _) = case.sweep(&["--sigma-rel", "0.05,0.1,0.15", "--refine", "2"]);
    assert_eq!((&document["failed"], &document["evaluated"]), (&0.into(), &5.into()));
    let best = serde_json::from_value(document["best"]["profile"].clone()).unwrap();
    assert_eq!(weight(&case.best()), case.average(&best));
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);
}

#[test]
fn other_files_in_the_directory_are_kept() {
    let case = Case::new();
    case.script("");
    fs::create_dir(&case.out).unwrap();
    fs::write(case.best(), "mine").unwrap();
    let (status, text) = case.failure(&["--sigma-rel", "0.1"]);
    assert!(status == 1 && text.contains("would replace best.safetensors"), "{text}");
    assert_eq!(fs::read(case.best()).unwrap(), b"mine");
    fs::remove_file(case.best()).unwrap();
    let others = [".posthoc-ema-abc123", "notes.txt"];
    others.iter().for_each(|name| fs::write(case.out.join(name), "mine").unwrap());
    case.sweep(&["--sigma-rel", "0.1"]);
    others.iter().for_each(|name| assert_eq!(fs::read(case.out.join(name)).unwrap(), b"mine"));
    // The directory of another run.
    let run = &case.run;
    let other = Case::new();
    let before = names(Path::new(&other.run));
    let (status, text) = failure(&["sweep", run, "--eval", "true {}", "--out-dir", &other.run, "--sigma-rel", "0.1"]);
    assert!(status == 1 && text.contains("sweep elsewhere"), "{text}");
    assert_eq!(names(Path::new(&other.run)), before);
}

/// Averages without an evaluation are removed with their list. Kept averages and other files stay.
#[test]
fn candidates_of_a_killed_sweep_are_removed() {
    let case = Case::new();
    case.script("");
    let folder = case.out.join("candidates");
    case.sweep(&["--sigma-rel", "0.1,0.2", "--refine", "0", "--keep-all"]);
    let kept = names(&folder);
    let run = Run::open(&case.run).unwrap();
    let pending = folder.join("sigma_rel-0.25.step-500.safetensors");
    run.write(&run.plan(profile(0.25), At::Latest).unwrap(), &pending).unwrap();
    let mine = folder.join("mine.safetensors");
    fs::copy(&pending, &mine).unwrap();
    fs::write(folder.join(".posthoc-ema-abc123"), "half a file").unwrap();
    case.sweep(&["--sigma-rel", "0.1,0.15", "--refine", "0"]);
    assert_eq!(names(&folder), [vec!["mine.safetensors".to_owned()], kept].concat());
}

/// As after a kill before an evaluated average was removed.
#[test]
fn evaluated_candidates_of_a_killed_sweep_are_removed() {
    let case = Case::new();
    let targets = [0.1, 0.2].map(profile);
    let options = SweepOptions { refine: 0, ..SweepOptions::new(&case.out, &targets) };
    let run = Run::open(&case.run).unwrap();
    let mut left = Vec::new();
    let evaluate = |candidate: &posthoc_ema::sweep::Candidate<'_>| {
        left.push((candidate.path.to_owned(), fs::read(candidate.path).unwrap()));
        Ok::<_, String>(left.len() as f64)
    };
    run.sweep(&options, evaluate).unwrap();
    assert_eq!(names(&case.out), [".lock", "best.safetensors", "sweep.json"]);
    for (path, bytes) in &left {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let mine = left[0].0.with_file_name("mine.txt");
    fs::write(&mine, "mine").unwrap();
    let nothing = |_: &posthoc_ema::sweep::Candidate<'_>| Err::<f64, _>("it was evaluated before");
    assert_eq!(run.sweep(&options, nothing).unwrap().evaluated, 0);
    assert_eq!(names(mine.parent().unwrap()), ["mine.txt"]);
    fs::remove_file(mine).unwrap();
    assert_eq!(run.sweep(&options, nothing).unwrap().evaluated, 0);
    assert_eq!(names(&case.out), [".lock", "best.safetensors", "sweep.json"]);
}
