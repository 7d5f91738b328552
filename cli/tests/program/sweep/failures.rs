//! Evaluations that fail, end too late or are killed.

use std::io::Read;

use posthoc_ema::{Device, Dtype, SweepOptions};

use super::*;

/// One failure of each kind.
#[test]
fn failed_evaluations_are_reported_and_the_others_scored() {
    let case = Case::new();
    let left = case.temp.path().join("left");
    case.script(&format!(
        "case \"$1\" in\n\
         *sigma_rel-0.05.*) echo partial; echo 'no module named torch' >&2; exit 3;;\n\
         *sigma_rel-0.08.*) kill -9 $$;;\n\
         *sigma_rel-0.11.*) echo all done; exit 0;;\n\
         *sigma_rel-0.17.*) echo nan; exit 0;;\n\
         *sigma_rel-0.2.*) sleep 1000 & echo $! > {}; sleep 1000;;\n\
         *sigma_rel-0.23.*) exit 0;;\n\
         esac",
        left.display()
    ));
    let start = Instant::now();
    let (document, stderr) = case.sweep(&[&LIST[..], &["--timeout", "1.5", "--refine", "0"]].concat());
    assert!(start.elapsed() < Duration::from_secs(500), "the sweep waited longer than the timeout");
    wait_for(|| (!is_alive(&fs::read_to_string(&left).unwrap())).then_some(()));
    assert_eq!((&document["failed"], &document["evaluated"]), (&6.into(), &8.into()));
    assert_eq!(document["best"]["length"]["sigma_rel"], 0.14);
    for (target, why) in [
        ("0.05", "its exit status is 3; the end of its output:\nno module named torch"),
        ("0.08", "signal 9"),
        ("0.11", "does not end in a number: all done"),
        ("0.17", "the score is NaN"),
        ("0.2", "it took longer than 1.5 s"),
        ("0.23", "it printed nothing"),
    ] {
        assert!(stderr.contains(&format!("warning: sigma_rel {target}: ")) && stderr.contains(why), "{why}: {stderr}");
    }
    assert!(stderr.starts_with("no module named torch\n"), "stderr passes through: {stderr}");
    assert_eq!(weight(&case.best()), case.average(&profile(0.14)));
}

/// A process in a session of its own cannot be killed with the evaluation, and keeps its pipes open.
#[test]
fn sweep_does_not_wait_for_processes_of_another_session() {
    let case = Case::new();
    let left = case.temp.path().join("left");
    case.script(&format!(
        "setsid sh -c 'echo $$ >> {}; exec sleep 1000' &\ncase \"$1\" in *sigma_rel-0.1.*) sleep 1000;; esac",
        left.display()
    ));
    let start = Instant::now();
    let (document, stderr) = case.sweep(&["--sigma-rel", "0.1,0.2", "--refine", "0", "--timeout", "2"]);
    for pid in wait_for(|| fs::read_to_string(&left).ok()).lines() {
        Command::new("kill").args(["-9", pid]).status().unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(500), "the sweep waited for the process");
    assert!(stderr.contains("warning: sigma_rel 0.1: it took longer than 2 s"), "{stderr}");
    assert_eq!((&document["failed"], &document["best"]["length"]["sigma_rel"]), (&1.into(), &0.2.into()));
}

#[test]
fn sweep_fails_if_all_evaluations_fail() {
    let case = Case::new();
    let eval = "false {}";
    let out = case.out.to_str().unwrap();
    let (status, text) =
        failure_with_table(&["sweep", &case.run, "--eval", eval, "--out-dir", out, "--sigma-rel", "0.1,0.2"]);
    assert!(status == 1 && text.contains("all 2 failed") && text.contains("exit status is 1"), "{text}");
    assert_eq!(case.names(), ["sweep.json"]);
    let (_, text) = failure_with_table(&[
        "sweep",
        &case.run,
        "--eval",
        "nonesuch {}",
        "--out-dir",
        &format!("{out}2"),
        "--gamma",
        "3",
    ]);
    assert!(text.contains("the shell could not run it") && text.contains("nonesuch"), "{text}");
}

/// Returns what [`failure`] does, for a command that prints its table first.
fn failure_with_table(arguments: &[&str]) -> (i32, String) {
    let output = posthoc_ema(arguments);
    assert!(String::from_utf8(output.stdout).unwrap().contains("failed"));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A sweep that is killed in an evaluation ends it, and the same command continues with the rest.
#[test]
fn killed_sweep_continues() {
    let case = Case::new();
    let log = case.temp.path().join("log");
    let hang = case.temp.path().join("hang");
    fs::write(&hang, "").unwrap();
    case.script(&format!(
        "echo \"$1\" >> {log}\nif [ -e {hang} ] && [ $(wc -l < {log}) -eq 4 ]; then echo $$ > {hang}; sleep 1000; fi",
        log = log.display(),
        hang = hang.display()
    ));
    let further = [&LIST[..], &["--batch", "3"]].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"))
        .args(case.arguments(&further))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = wait_for(|| fs::read_to_string(&hang).ok().filter(|text| text.ends_with('\n')));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for(|| (!is_alive(&pid)).then_some(()));
    assert_eq!(recorded(&case), 3);
    fs::remove_file(&hang).unwrap();

    let (document, stderr) = case.sweep(&further);
    assert_eq!((stderr.as_str(), document["trials"].as_array().unwrap().len()), ("", 14));
    assert_eq!(document["evaluated"], 11);
    // One call for each trial, and a second one for the interrupted trial.
    let calls = fs::read_to_string(&log).unwrap();
    let mut names: Vec<&str> = calls.lines().collect();
    assert_eq!((names.len(), names[3]), (15, names[4]));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 14);
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);

    // A finished sweep evaluates nothing, and writes a missing best average again.
    fs::remove_file(case.best()).unwrap();
    let (again, _) = case.sweep(&further);
    assert_eq!((&again["evaluated"], &again["trials"]), (&0.into(), &document["trials"]));
    let best = serde_json::from_value(again["best"]["profile"].clone()).unwrap();
    assert_eq!(weight(&case.best()), case.average(&best));
}

#[test]
fn failed_evaluations_are_tried_again() {
    let case = Case::new();
    let log = case.temp.path().join("log");
    let broken = case.temp.path().join("broken");
    fs::write(&broken, "").unwrap();
    case.script(&format!(
        "echo \"$1\" >> {}\ncase \"$1\" in *sigma_rel-0.14.*) [ ! -e {} ] || exit 1;; esac",
        log.display(),
        broken.display()
    ));
    let further = [&LIST[..], &["--refine", "0"]].concat();
    let (before, _) = case.sweep(&further);
    assert_eq!((&before["failed"], recorded(&case)), (&1.into(), 8));
    fs::remove_file(broken).unwrap();
    let (after, _) = case.sweep(&further);
    assert_eq!((&after["failed"], &after["evaluated"]), (&0.into(), &1.into()));
    assert_eq!(after["best"]["length"]["sigma_rel"], 0.14);
    assert_eq!(weight(&case.best()), case.average(&profile(0.14)));
    assert!(fs::read_to_string(log).unwrap().lines().last().unwrap().contains("sigma_rel-0.14."));
    // A longer list and more refinement use the recorded scores.
    let (wider, _) = case.sweep(&["--sigma-rel", "0.05,0.08,...,0.26,0.28", "--refine", "2"]);
    assert_eq!((&wider["evaluated"], recorded(&case)), (&3.into(), 11));
}

#[test]
fn sweep_that_ends_with_an_error_leaves_no_candidates() {
    let case = Case::new();
    let targets = [0.1, 0.15, 0.2].map(profile);
    let run = Run::open(&case.run).unwrap();
    let evaluate = |_: &posthoc_ema::sweep::Candidate<'_>| {
        let document = case.out.join("sweep.json");
        fs::remove_file(&document).and_then(|()| fs::create_dir(&document)).map(|()| 1.0)
    };
    let text = run.sweep(&SweepOptions::new(&case.out, &targets), evaluate).err().unwrap().to_string();
    assert!(text.contains("sweep.json"), "{text}");
    assert_eq!(names(&case.out), [".lock", "sweep.json"]);
}

#[test]
fn bad_usage_and_failures_name_their_cause() {
    let case = Case::new();
    case.script("");
    for (further, part) in [
        (vec![], "no target"),
        (vec!["--sigma-rel", "0.1", "--timeout", "0"], "above 0"),
        (vec!["--sigma-rel", "0.1", "--timeout", "NaN"], "above 0"),
        (vec!["--sigma-rel", "0.1", "--batch", "0"], "1..=256"),
        (vec!["--sigma-rel", "0.3"], "the plain mean"),
    ] {
        let (status, text) = case.failure(&further);
        assert!(status == 2 && text.contains(part), "{further:?}: {text}");
    }
    let out = case.out.to_str().unwrap();
    let (status, text) =
        failure(&["sweep", &case.run, "--eval", "python eval.py", "--out-dir", out, "--sigma-rel", "0.1"]);
    assert!(status == 2 && text.contains("write {} where the path"), "{text}");
    let quoted = ["sweep", &case.run, "--eval", "sh -c 'eval {}'", "--out-dir", out, "--sigma-rel", "0.1"];
    let (status, text) = failure(&quoted);
    assert!(status == 2 && text.contains("use \"$POSTHOC_EMA_WEIGHTS\" there"), "{text}");
    for (further, part) in [
        (vec!["--sigma-rel", "0.1", "--at", "49"], "before the first snapshot (step 50)"),
        (vec!["--sigma-rel", "0.1", "--at", "501"], "after the last snapshot"),
        (vec!["--uniform", "501"], "no longer than the target time"),
    ] {
        let (status, text) = case.failure(&further);
        assert!(status == 1 && text.contains(part), "{further:?}: {text}");
    }
    assert!(!case.out.exists(), "a failed sweep creates no directory");
    for inside in [case.run.clone(), format!("{}/deep/sweep", case.run)] {
        let (status, text) =
            failure(&["sweep", &case.run, "--eval", "true {}", "--out-dir", &inside, "--sigma-rel", "0.1"]);
        assert!(status == 1 && text.contains("sweep elsewhere"), "{text}");
    }
    Run::open(&case.run).unwrap();
    assert!(!Path::new(&case.run).join("deep").exists());
}

/// The shortest average is too large for f16.
#[test]
fn average_beyond_its_dtype_fails_alone() {
    let case = Case::scaled(140.0);
    let targets = [0.05, 0.1, 0.15, 0.2].map(profile);
    let options = SweepOptions { dtype: Some(Dtype::F16), refine: 0, ..SweepOptions::new(&case.out, &targets) };
    let run = Run::open(&case.run).unwrap();
    let mut seen = Vec::new();
    let swept = run
        .sweep(&options, |candidate| {
            seen.push(candidate.plan.profile.clone());
            let bytes = fs::read(candidate.path)?;
            Ok::<_, std::io::Error>(bytes.len() as f64)
        })
        .unwrap();
    assert_eq!(seen, targets[1..]);
    let (trial, why) = swept.sweep.failures().next().unwrap();
    assert!(trial.profile == targets[0] && why.contains("tensor `weight`"), "{why}");
    assert_eq!(swept.sweep.best().unwrap().profile, targets[1]);
    assert_eq!(load(&swept.best[0]).get("weight").unwrap().dtype, Dtype::F16);
}

#[test]
fn failed_closure_evaluation_is_recorded() {
    let case = Case::new();
    let targets = [0.05, 0.1, 0.15].map(profile);
    let options = SweepOptions { refine: 2, device: Device::Auto, ..SweepOptions::new(&case.out, &targets) };
    let run = Run::open(&case.run).unwrap();
    let evaluate = |candidate: &posthoc_ema::sweep::Candidate<'_>| match candidate.plan.profile == targets[0] {
        true => Err("out of memory"),
        false => Ok(f64::from(weight(candidate.path))),
    };
    let swept = run.sweep(&options, evaluate).unwrap();
    assert_eq!(swept.sweep.failures().map(|(_, why)| why).collect::<Vec<_>>(), ["out of memory"]);
    assert_eq!((swept.evaluated, swept.sweep.trials().len()), (5, 5));
    assert!(swept.sweep.best().unwrap().profile.family().unwrap().1 > 0.15, "longer averages of a ramp are smaller");
    let mut text = String::new();
    fs::File::open(case.out.join("sweep.json")).unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("\"out of memory\"") && text.contains("\"posthoc_ema_sweep\": 1"), "{text}");
}
