//! Evaluations side by side.

use super::*;

/// Returns a document without what may differ between two sweeps with the same scores.
fn without_times(document: &Value) -> Value {
    let mut document = document.clone();
    for trial in document["trials"].as_array_mut().unwrap() {
        trial["seconds"] = Value::Null;
    }
    document["trials"].clone()
}

/// Each evaluation waits for one of another job, and the first ones end last.
#[test]
fn jobs_run_side_by_side_with_the_targets_and_the_order_of_one() {
    let case = Case::new();
    let [marks, other] = ["marks", "other"].map(|name| case.temp.path().join(name));
    fs::create_dir(&marks).unwrap();
    let noise = "echo \"evaluating $POSTHOC_EMA_REPEAT $1\" | sed 's/ .*sigma_rel/ sigma_rel/' >&2";
    case.script(&format!(
        "{noise}\n[ \"$2\" = \"$POSTHOC_EMA_JOB\" ] || exit 3\n: > {marks}/$POSTHOC_EMA_JOB\ni=0\n\
         while [ ! -e {marks}/1 ] || [ ! -e {marks}/0 ]; do sleep 0.02; i=$((i + 1)); [ $i -lt 3000 ] || exit 4; done\n\
         case \"$1\" in *sigma_rel-0.05.*) sleep 0.4;; esac",
        marks = marks.display()
    ));
    let eval = format!("sh {} {{}} {{job}}", case.script.display());
    let run = |out: &Path, further: &[&str]| {
        let fixed = ["sweep", &case.run, "--eval", &eval, "--out-dir", out.to_str().unwrap(), "--json"];
        let output = posthoc_ema(&[&fixed[..], &LIST, &["--repeats", "2", "--refine", "0"], further].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        (serde_json::from_slice::<Value>(&output.stdout).unwrap(), stderr)
    };
    let (side_by_side, errors) = run(&case.out, &["--jobs", "3"]);
    assert_eq!((&side_by_side["failed"], &side_by_side["evaluated"]), (&0.into(), &16.into()));
    let (alone, errors_alone) = run(&other, &[]);
    assert_eq!(without_times(&side_by_side), without_times(&alone));
    assert_eq!((errors.lines().count(), errors), (16, errors_alone), "the order is that of one job");
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);
    assert_eq!(fs::read(case.best()).unwrap(), fs::read(other.join("best.safetensors")).unwrap());
}

/// All evaluations end with the sweep, and the same command continues with the rest.
#[test]
fn interrupted_jobs_end_and_the_sweep_continues() {
    // A process in the background ignores SIGINT.
    for signal in ["-TERM", "-KILL"] {
        let case = Case::new();
        let hang = case.temp.path().join("hang");
        fs::create_dir(&hang).unwrap();
        case.script(&format!(
            "case \"$1\" in *sigma_rel-0.05.*) ;; *) if [ -d {hang} ]; then echo $$ > {hang}/$POSTHOC_EMA_JOB; \
             sleep 1000; fi;; esac",
            hang = hang.display()
        ));
        let further = [&LIST[..], &["--jobs", "3", "--refine", "2"]].concat();
        let mut child = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"))
            .args(case.arguments(&further))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let is_whole = |job: u32| fs::read_to_string(hang.join(job.to_string())).ok().filter(|pid| pid.ends_with('\n'));
        let pids: Vec<String> = (0..3).map(|job| wait_for(|| is_whole(job))).collect();
        wait_for(|| (recorded(&case) == 1).then_some(()));
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert!(!child.wait().unwrap().success());
        pids.iter().for_each(|pid| wait_for(|| (!is_alive(pid)).then_some(())));
        assert_eq!(recorded(&case), 1);
        fs::remove_dir_all(&hang).unwrap();
        let (document, _) = case.sweep(&further);
        assert_eq!((&document["evaluated"], &document["failed"]), (&9.into(), &0.into()));
        assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);
    }
}

/// A repeat that fails ends the others of its average, and no file is left.
#[test]
fn failed_repeats_of_jobs_are_recorded_once() {
    let case = Case::new();
    case.script("case \"$1\" in *sigma_rel-0.08.*) echo broken >&2; exit 1;; esac");
    let (document, errors) = case.sweep(&[&LIST[..], &["--jobs", "4", "--repeats", "3", "--refine", "0"]].concat());
    assert_eq!(document["failed"], 1);
    assert!(errors.contains("warning: sigma_rel 0.08: its exit status is 1"), "{errors}");
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);
}

/// Four refinements run at a time: each waits for the others. Their trials do not depend on the order they end in.
#[test]
fn refinements_run_side_by_side_whichever_ends_first() {
    let case = Case::new();
    case.script("");
    let script = fs::read_to_string(&case.script).unwrap();
    let run = |out: &str, slow: &str| {
        let marks = case.temp.path().join(format!("marks-{out}"));
        fs::create_dir(&marks).unwrap();
        // Refined lengths have more than two digits.
        let wait = format!(
            "case \"$1\" in *sigma_rel-0.???.*|*sigma_rel-0.????.*|*sigma_rel-0.?????.*) : > {marks}/$POSTHOC_EMA_JOB\n\
             i=0; while [ $(ls {marks} | wc -l) -lt 4 ]; do sleep 0.02; i=$((i + 1)); [ $i -lt 3000 ] || exit 4\n\
             done;; esac\n[ $POSTHOC_EMA_JOB != {slow} ] || sleep 0.3\n",
            marks = marks.display(),
        );
        fs::write(&case.script, wait + &script).unwrap();
        let eval = case.eval();
        let dir = case.temp.path().join(out);
        let fixed = ["sweep", &case.run, "--eval", &eval, "--out-dir", dir.to_str().unwrap(), "--json"];
        let output = posthoc_ema(&[&fixed[..], &LIST, &["--jobs", "4", "--refine", "8"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&document["failed"], &document["evaluated"]), (&0.into(), &16.into()), "{stderr}");
        document
    };
    let (first, second) = (run("first", "0"), run("second", "3"));
    assert_eq!(without_times(&first), without_times(&second));
    let found = first["best"]["length"]["sigma_rel"].as_f64().unwrap();
    // Two rounds of four leave a ninth of two intervals.
    assert!((found - OPTIMUM).abs() <= 0.06 / 9.0, "{found}");
}
