//! Sweeps of the program, whose evaluations are shell scripts, and of the library.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{failure, load, names, posthoc_ema, stdout};
use posthoc_ema::{At, Device, Dtype, PostHocEma, Profile, Run, SweepOptions};
use serde_json::Value;

/// Length with the best score.
const OPTIMUM: f64 = 0.137;

/// A run over a ramp: the average of a profile is its mean time, so that every length has another one.
struct Case {
    temp: tempfile::TempDir,
    run: String,
    out: PathBuf,
    script: PathBuf,
}

impl Case {
    fn new() -> Case {
        Case::scaled(1.0)
    }

    fn scaled(scale: f32) -> Case {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("run");
        let mut model = vec![("weight", vec![0.0f32; 3])];
        let mut ema = PostHocEma::options(&run).checkpoint_every(50).snapshot_growth(None).create(&model).unwrap();
        for step in 1..=500u16 {
            model[0].1.fill(scale * f32::from(step));
            ema.update(&model).unwrap();
        }
        ema.finish().unwrap();
        let out = temp.path().join("sweep");
        let script = temp.path().join("eval.sh");
        Case { run: run.to_str().unwrap().to_owned(), out, script, temp }
    }

    /// Writes an evaluation script: `before`, then the squared distance from the average of the optimum.
    fn script(&self, before: &str) {
        let optimum = self.average(&profile(OPTIMUM));
        let text = format!(
            "{before}\nheader=$(od -An -tu8 -N8 \"$1\")\n\
             value=$(od -An -tf4 -j$((8 + header)) -N4 \"$1\")\n\
             echo loading\nawk -v \"x=$value\" 'BEGIN {{ d = x - {optimum}; print \"score\", d * d }}'\n"
        );
        fs::write(&self.script, text).unwrap();
    }

    fn average(&self, profile: &Profile) -> f32 {
        let run = Run::open(&self.run).unwrap();
        run.load(&run.plan(profile.clone(), At::Latest).unwrap())
            .unwrap()
            .get("weight")
            .unwrap()
            .to_vec::<f32>()
            .unwrap()[0]
    }

    fn eval(&self) -> String {
        format!("sh {} {{}}", self.script.display())
    }

    fn arguments(&self, further: &[&str]) -> Vec<String> {
        let fixed = ["sweep", &self.run, "--eval", &self.eval(), "--out-dir", self.out.to_str().unwrap()];
        fixed.iter().chain(further).map(|&word| word.to_owned()).collect()
    }

    fn sweep(&self, further: &[&str]) -> (Value, String) {
        let arguments = [self.arguments(further), vec!["--json".into()]].concat();
        let output = posthoc_ema(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let text = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(text.lines().count(), 1, "one document and nothing else: {text}");
        (serde_json::from_str(&text).unwrap(), stderr)
    }

    fn failure(&self, further: &[&str]) -> (i32, String) {
        failure(&self.arguments(further).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn best(&self) -> PathBuf {
        self.out.join("best.safetensors")
    }

    /// Returns the names of the visible files in the directory of the sweep.
    fn names(&self) -> Vec<String> {
        names(&self.out).into_iter().filter(|name| !name.starts_with('.')).collect()
    }
}

fn profile(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

fn weight(path: &Path) -> f32 {
    load(path).get("weight").unwrap().to_vec::<f32>().unwrap()[0]
}

const LIST: [&str; 2] = ["--sigma-rel", "0.05,0.08,...,0.26"];

#[test]
fn sweep_finds_and_keeps_the_best_length() {
    let case = Case::new();
    case.script("");
    let (document, stderr) = case.sweep(&LIST);
    assert_eq!(stderr, "");
    let trials = document["trials"].as_array().unwrap();
    assert_eq!((trials.len(), &document["evaluated"], &document["failed"]), (14, &14.into(), &0.into()));
    let found = document["best"]["length"]["sigma_rel"].as_f64().unwrap();
    // Two intervals of the list, narrowed by six golden-section steps.
    assert!((found - OPTIMUM).abs() <= 0.06 / 1.38f64.powi(6), "{found}");
    assert!(document["best"]["refined"] == true && document["edge"] == Value::Null);
    assert_eq!(document["path"], case.best().to_str().unwrap());
    let best: Profile = serde_json::from_value(document["best"]["profile"].clone()).unwrap();
    let run = Run::open(&case.run).unwrap();
    assert_eq!(load(&case.best()), run.load(&run.plan(best, At::Latest).unwrap()).unwrap());
    for trial in trials {
        let average = f64::from(case.average(&serde_json::from_value(trial["profile"].clone()).unwrap()));
        let expected = (average - f64::from(case.average(&profile(OPTIMUM)))).powi(2);
        // Both averages, of up to about 400, are printed to 1e-4 at worst, and the score to six digits.
        let tolerance = 1e-5 * expected + 2.0 * 2e-4 * expected.sqrt() + 2e-4f64.powi(2);
        let score = trial["score"].as_f64().unwrap();
        assert!((score - expected).abs() <= tolerance, "{score} is not {expected}");
    }
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"], "the other averages are removed");
}

#[test]
fn table_marks_the_best_trial() {
    let case = Case::new();
    case.script("");
    let arguments =
        case.arguments(&["--sigma-rel", "0.05,0.1,0.15", "--half-life", "5", "--refine", "1", "--maximize"]);
    let text = stdout(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let best: Vec<&str> = text.lines().filter(|line| line.trim_end().ends_with("best")).collect();
    assert!(best.len() == 1 && best[0].trim_start().starts_with("half_life 5"), "{text}");
    assert!(
        text.contains("relative error")
            && text.contains("best at step 500: half_life")
            && text.contains("best.safetensors")
    );
    let wide = case.temp.path().join("wide").to_str().unwrap().to_owned();
    let eval = case.eval();
    let text =
        stdout(&["sweep", &case.run, "--eval", &eval, "--out-dir", &wide, "--sigma-rel", "0.2,0.22", "--refine", "2"]);
    assert!(text.contains("nothing shorter was evaluated") && text.contains("refined"), "{text}");
}

/// The optimum is beyond the list, and the averages that the run makes well end before the shortest ones do.
#[test]
fn best_at_edge_is_searched_outwards_within_reach() {
    let case = Case::new();
    case.script("");
    let (document, _) = case.sweep(&["--sigma-rel", "0.2,0.22,0.24", "--refine", "9"]);
    let found = document["best"]["length"]["sigma_rel"].as_f64().unwrap();
    assert!((found - OPTIMUM).abs() < 0.01 && document["edge"] == Value::Null, "{found}");
    // The greatest weight of a ramp is that of the shortest average.
    let out = case.temp.path().join("shortest").to_str().unwrap().to_owned();
    let eval = "od -An -tf4 -j$((8 + $(od -An -tu8 -N8 {}))) -N4 {}";
    let arguments = ["sweep", &case.run, "--eval", eval, "--out-dir", &out, "--sigma-rel", "0.1,0.12", "--maximize"];
    let document: Value = serde_json::from_str(&stdout(&[&arguments[..], &["--json"]].concat())).unwrap();
    assert_eq!((&document["edge"], &document["at_limit"]), (&"shortest".into(), &true.into()), "{document}");
    for trial in document["trials"].as_array().unwrap() {
        assert!(trial["relative_error"].as_f64().unwrap() <= 0.05, "{trial}");
    }
    assert!(document["best"]["length"]["sigma_rel"].as_f64().unwrap() < 0.06, "{document}");
    assert!(stdout(&arguments).contains("makes nothing shorter with a relative error below 5%"));
}

/// The evaluation adds noise that it seeds by the repeat alone: all lengths share it, so it does not count.
#[test]
fn repeats_give_standard_errors_and_lengths_that_are_as_good() {
    let case = Case::new();
    let optimum = case.average(&profile(OPTIMUM));
    let run = |noise: &str, out: &str| {
        let eval = format!(
            "value=$(od -An -tf4 -j$((8 + $(od -An -tu8 -N8 {{}}))) -N4 {{}}); \
             awk -v \"x=$value\" -v path={{}} 'BEGIN {{ \
             srand({noise}); d = (x - {optimum}) / 50; print d * d + rand() }}'"
        );
        let out = case.temp.path().join(out).to_str().unwrap().to_owned();
        let arguments = ["sweep", &case.run, "--eval", &eval, "--out-dir", &out, "--repeats", "3", LIST[0], LIST[1]]
            .map(str::to_owned);
        let text = stdout(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let json = [&arguments[..], &["--json".to_owned()]].concat();
        let document = stdout(&json.iter().map(String::as_str).collect::<Vec<_>>());
        (text, serde_json::from_str::<Value>(&document).unwrap())
    };
    let (text, document) = run("{repeat}", "shared");
    let metric = &document["metrics"][0];
    assert!(metric["standard_error"].as_f64().unwrap() < 1e-5, "{document}");
    assert_eq!(metric["as_good"].as_array().unwrap().len(), 1);
    assert!(text.contains("no other length is as good"), "{text}");
    let found = document["best"]["length"]["sigma_rel"].as_f64().unwrap();
    assert!((found - OPTIMUM).abs() <= 0.06 / 1.38f64.powi(6), "{found}");
    let repeats = &document["trials"][0]["repeats"];
    assert!(repeats["1"] != repeats["2"] && repeats["2"] != repeats["3"], "{repeats}");

    // Seeds of the length and the repeat are noise of a standard deviation of 0.29.
    let (text, document) = run("'$POSTHOC_EMA_REPEAT' * 1000 + length(path) + int(x * 100) % 997", "noisy");
    let metric = &document["metrics"][0];
    let error = metric["standard_error"].as_f64().unwrap();
    assert!(error > 0.05 && error < 0.4, "{error}");
    let as_good = metric["as_good"].as_array().unwrap();
    assert!(as_good.iter().any(|length| (length["sigma_rel"].as_f64().unwrap() - OPTIMUM).abs() < 0.02), "{metric}");
    assert!(text.contains(" are as good (standard error ") && text.contains("as good"), "{text}");
    assert_eq!(document["evaluated"], 0, "a finished sweep evaluates nothing again");
}

#[test]
fn each_metric_keeps_its_best_average() {
    let case = Case::new();
    case.script("");
    let text = fs::read_to_string(&case.script).unwrap();
    let text = text.replace("print \"score\", d * d", "print \"dist:\", d * d; print \"mean = \" x");
    fs::write(&case.script, text).unwrap();
    let further = [&LIST[..], &["--metric", "dist", "--metric", "mean:max", "--refine", "4"]].concat();
    let (document, _) = case.sweep(&further);
    let [dist, mean] = [0, 1].map(|metric| document["metrics"][metric].clone());
    assert_eq!((&dist["name"], &mean["name"], &mean["goal"]), (&"dist".into(), &"mean".into(), &"maximize".into()));
    let length = |metric: &Value| metric["best"]["length"]["sigma_rel"].as_f64().unwrap();
    assert!((length(&dist) - OPTIMUM).abs() <= 0.06 / 1.38f64.powi(4) && length(&mean) <= 0.05, "{document}");
    for (metric, file) in [(&dist, "best.safetensors"), (&mean, "best-mean.safetensors")] {
        let best = serde_json::from_value(metric["best"]["profile"].clone()).unwrap();
        assert_eq!(weight(&case.out.join(file)), case.average(&best));
        assert_eq!(metric["path"], case.out.join(file).to_str().unwrap());
    }
    assert_eq!(case.names(), ["best-mean.safetensors", "best.safetensors", "sweep.json"]);
    // Averages that are shorter than that of the best distance have greater means and greater distances.
    for trial in document["trials"].as_array().unwrap() {
        let is_shorter = trial["length"]["sigma_rel"].as_f64().unwrap() <= length(&dist);
        assert_eq!(document["unbeaten"].as_array().unwrap().contains(trial), is_shorter, "{trial}");
    }
    let arguments = case.arguments(&further);
    let text = stdout(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(text.contains("best dist") && text.contains("best by mean at step 500"), "{text}");
    let (status, text) = case.failure(&[&further[..], &["--metric", "fid"]].concat());
    assert!(
        status == 1 && text.contains("has other metrics (dist:min, mean:max, and now dist:min, mean:max, fid:min)"),
        "{text}"
    );
    for (further, part) in [(["--metric", "fid:up"], "write min or max"), (["--metric", "a/b"], "no name of letters")] {
        let (status, text) = case.failure(&[&LIST[..], &further].concat());
        assert!(status == 2 && text.contains(part), "{text}");
    }
}

/// A run of an encoder that moves as a ramp, and a decoder that moves as the square root of the time.
fn two_parts(dir: &Path) {
    let mut model = vec![("decoder.a", vec![0.0f32; 5]), ("decoder.b", vec![0.0; 2]), ("encoder.a", vec![0.0; 3])];
    let mut ema = PostHocEma::options(dir).checkpoint_every(50).snapshot_growth(None).create(&model).unwrap();
    for step in 1..=500u16 {
        for (name, values) in &mut model {
            let step = f32::from(step);
            values.fill(if name.starts_with("encoder") { step } else { 20.0 * step.sqrt() });
        }
        ema.update(&model).unwrap();
    }
    ema.finish().unwrap();
}

/// Each tensor is that of the average with its group's length alone.
#[test]
fn groups_have_the_weights_of_their_own_length() {
    let temp = tempfile::tempdir().unwrap();
    let [dir, file] = ["run", "average.safetensors"].map(|name| temp.path().join(name));
    two_parts(&dir);
    let run = Run::open(&dir).unwrap();
    let row = [0.1, 0.2, 0.05].map(profile).to_vec();
    let groups = ["decoder.a", "enc*"].map(str::to_owned);
    let noise = posthoc_ema::Noise::Off;
    let plans =
        run.grouped_plans(&[row.clone(), row.iter().rev().cloned().collect()], &groups, At::Latest, noise).unwrap();
    assert!(plans[0].relative_error < 0.05 && plans[0].predicted.is_none());
    let output = |plan, path| posthoc_ema::Output { plan, path };
    let other = temp.path().join("other.safetensors");
    run.write_all(&[output(&plans[0], &file), output(&plans[1], &other)], &posthoc_ema::WriteOptions::default())
        .unwrap();
    let (joint, reverse) = (load(&file), load(&other));
    for (name, part) in [("decoder.b", 0), ("decoder.a", 1), ("encoder.a", 2)] {
        for (tensors, target) in [(&joint, &row[part]), (&reverse, &row[2 - part])] {
            let alone = run.load(&run.plan(target.clone(), At::Latest).unwrap()).unwrap();
            let values = |tensors: &posthoc_ema::Tensors| tensors.get(name).unwrap().to_vec::<f32>().unwrap();
            assert_eq!(values(tensors), values(&alone), "{name}");
        }
    }
    for (groups, part) in [
        (["nothing*", "enc*"], "matches no averaged tensor"),
        (["decoder.*", "*.a"], "tensor `decoder.a` is in both"),
        (["[", "enc*"], "group"),
    ] {
        let groups = groups.map(str::to_owned);
        let text = run.grouped_plans(std::slice::from_ref(&row), &groups, At::Latest, noise).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn joint_sweep_finds_the_length_of_each_group() {
    let temp = tempfile::tempdir().unwrap();
    let [dir, out] = ["run", "sweep"].map(|name| temp.path().join(name));
    two_parts(&dir);
    let run = Run::open(&dir).unwrap();
    let value = |sigma_rel, name: &str| {
        run.load(&run.plan(profile(sigma_rel), At::Latest).unwrap())
            .unwrap()
            .get(name)
            .unwrap()
            .to_vec::<f32>()
            .unwrap()[0]
    };
    let (decoder, encoder) = (value(0.19, "decoder.a"), value(0.09, "encoder.a"));
    // The file has the seven values of the decoder, then those of the encoder.
    let eval = format!(
        "set -- {{}} && od -An -v -w4 -tf4 -j$((8 + $(od -An -tu8 -N8 \"$1\"))) \"$1\" | \
         awk 'NR == 1 {{ d = ($1 - {decoder}) / 4 }} NR == 8 {{ e = ($1 - {encoder}) / 10 }} \
              END {{ print d * d + e * e }}'"
    );
    let arguments = |further: &[&str]| {
        let (dir, out) = (dir.to_str().unwrap(), out.to_str().unwrap());
        let fixed = ["sweep", dir, "--eval", &eval, "--out-dir", out, LIST[0], LIST[1]];
        [&fixed[..], further].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run_with = |further: &[&str]| {
        let all = arguments(further);
        stdout(&all.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let document: Value = serde_json::from_str(&run_with(&["--group", "decoder.*", "--json"])).unwrap();
    let best = &document["best"];
    let (base, group) =
        (best["length"]["sigma_rel"].as_f64(), best["group_lengths"]["decoder.*"]["sigma_rel"].as_f64());
    assert!((base.unwrap() - 0.09).abs() < 0.01 && (group.unwrap() - 0.19).abs() < 0.01, "{best}");
    let kept = load(&out.join("best.safetensors"));
    let targets = |name: &str| value(if name == "encoder.a" { base.unwrap() } else { group.unwrap() }, name);
    for name in ["decoder.a", "decoder.b", "encoder.a"] {
        let found = kept.get(name).unwrap().to_vec::<f32>().unwrap()[0];
        assert!((found - targets(name)).abs() <= 1e-4 * found, "{name}");
    }
    let record: Value = serde_json::from_str(&fs::read_to_string(out.join("sweep.json")).unwrap()).unwrap();
    assert_eq!((&record["groups"][0], &record["posthoc_ema_sweep"]), (&"decoder.*".into(), &2.into()));
    assert!(record["trials"].as_array().unwrap().iter().all(|trial| trial["groups"]["decoder.*"].is_object()));
    assert_eq!(names(&out), [".lock", "best.safetensors", "sweep.json"]);
    // A finished sweep evaluates nothing again.
    let again: Value = serde_json::from_str(&run_with(&["--group", "decoder.*", "--json"])).unwrap();
    assert_eq!((&again["evaluated"], &again["best"]), (&0.into(), best));
    let text = run_with(&["--group", "decoder.*"]);
    assert!(text.contains("other tensors") && text.contains(" for decoder.*, kept as "), "{text}");
    let all = arguments(&[]);
    let (status, text) = failure(&all.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(status == 1 && text.contains("has other groups (decoder.*, and now none)"), "{text}");
    let all = arguments(&["--group", "nothing*"]);
    let (status, text) = failure(&all.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(status == 1 && text.contains("`nothing*` matches no averaged tensor"), "{text}");
}

/// The score has its optimum at one length of the run and another one of the guiding run.
#[test]
fn joint_sweep_finds_the_lengths_of_two_runs() {
    let (case, guide) = (Case::new(), Case::scaled(0.5));
    let (first, second) = (case.average(&profile(0.1)), guide.average(&profile(0.19)));
    let log = case.temp.path().join("log");
    let read = |path: &str| format!("$(od -An -tf4 -j$((8 + $(od -An -tu8 -N8 {path}))) -N4 {path})");
    let eval = format!(
        "[ {{with}} = \"$POSTHOC_EMA_WITH\" ] || exit 3; echo {{with}} >> {log}; \
         awk -v \"x={x}\" -v \"y={y}\" 'BEGIN {{ d = (x - {first}) / 10; e = (y - {second}) / 5; \
              print d * d + e * e }}'",
        log = log.display(),
        x = read("{}").replace("{}", "$POSTHOC_EMA_WEIGHTS"),
        y = read("$POSTHOC_EMA_WITH"),
    );
    let out = case.out.to_str().unwrap();
    let arguments = ["sweep", &case.run, "--with", &guide.run, "--eval", &eval, "--out-dir", out, LIST[0], LIST[1]];
    let further = ["--jobs", "2", "--json"];
    let document: Value = serde_json::from_str(&stdout(&[&arguments[..], &further].concat())).unwrap();
    let best = &document["best"];
    let found =
        [&best["length"]["sigma_rel"], &best["group_lengths"]["with"]["sigma_rel"]].map(|v| v.as_f64().unwrap());
    assert!((found[0] - 0.1).abs() < 0.01 && (found[1] - 0.19).abs() < 0.01, "{best}");
    assert_eq!(document["failed"], 0);
    let stored = |value: &Value| serde_json::from_value::<Profile>(value.clone()).unwrap();
    assert_eq!(weight(&case.best()), case.average(&stored(&best["profile"])));
    assert_eq!(weight(&case.out.join("best-with.safetensors")), guide.average(&stored(&best["groups"]["with"])));
    assert_eq!(case.names(), ["best-with.safetensors", "best.safetensors", "sweep.json"]);
    assert!(fs::read_to_string(log).unwrap().lines().all(|path| path.contains("evaluating-with")));
    let again: Value = serde_json::from_str(&stdout(&[&arguments[..], &further].concat())).unwrap();
    assert_eq!((&again["evaluated"], &again["best"]), (&0.into(), best));
    // A lost file of either run is made again.
    fs::remove_file(case.out.join("best-with.safetensors")).unwrap();
    let text = stdout(&arguments);
    assert!(text.contains(" for with, kept as ") && text.contains("best-with.safetensors"), "{text}");
    assert_eq!(weight(&case.out.join("best-with.safetensors")), guide.average(&stored(&best["groups"]["with"])));
    assert_eq!(case.names(), ["best-with.safetensors", "best.safetensors", "sweep.json"]);
    // Another second run, none, and a command that does not use it.
    let other = Case::new();
    let with_other = ["sweep", &case.run, "--with", &other.run, "--eval", &eval, "--out-dir", out, LIST[0], LIST[1]];
    let (status, text) = failure(&with_other);
    assert!(status == 1 && text.contains("has another second run"), "{text}");
    let (status, text) = failure(&[&["sweep", &case.run][..], &arguments[4..]].concat());
    assert!(status == 1 && text.contains("second run") && text.contains("now none"), "{text}");
    let (status, text) = failure(&[&arguments[..4], &["--eval", "true {}", "--out-dir", out], &LIST[..]].concat());
    assert!(status == 2 && text.contains("write {with} where its path goes"), "{text}");
}

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
fn jobs_run_side_by_side_with_the_trials_and_the_order_of_one() {
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
        let output = posthoc_ema(&[&fixed[..], &LIST, &["--repeats", "2"], further].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        (serde_json::from_slice::<Value>(&output.stdout).unwrap(), stderr)
    };
    let (side_by_side, errors) = run(&case.out, &["--jobs", "3"]);
    assert_eq!((&side_by_side["failed"], &side_by_side["evaluated"]), (&0.into(), &28.into()));
    let (alone, errors_alone) = run(&other, &[]);
    assert_eq!(without_times(&side_by_side), without_times(&alone));
    assert_eq!((errors.lines().count(), errors), (28, errors_alone), "the order is that of one job");
    assert_eq!(case.names(), ["best.safetensors", "sweep.json"]);
    assert_eq!(fs::read(case.best()).unwrap(), fs::read(other.join("best.safetensors")).unwrap());
}

/// All evaluations end with the sweep, and the same command continues with the rest.
#[test]
fn interrupted_jobs_end_and_the_sweep_continues() {
    for signal in ["-INT", "-KILL"] {
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

#[test]
fn flat_curve_is_called_flat_and_not_refined() {
    let case = Case::new();
    let arguments = ["sweep", &case.run, "--eval", ": {}; echo 0.93", "--out-dir", case.out.to_str().unwrap()];
    let arguments = [&arguments[..], &LIST].concat();
    let text = stdout(&arguments);
    assert!(text.contains("the curve is flat: all lengths have the same score"), "{text}");
    let document: Value = serde_json::from_str(&stdout(&[&arguments[..], &["--json"]].concat())).unwrap();
    assert_eq!((&document["flat"], &document["edge"]), (&true.into(), &Value::Null));
    assert_eq!(document["trials"].as_array().unwrap().len(), 8);
}

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

/// Waits until another process has done something.
fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(300), "waited for five minutes");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_alive(pid: &str) -> bool {
    Command::new("kill").args(["-0", pid.trim()]).stderr(Stdio::null()).status().unwrap().success()
}

fn recorded(case: &Case) -> usize {
    let document: Value = serde_json::from_str(&fs::read_to_string(case.out.join("sweep.json")).unwrap()).unwrap();
    document["trials"].as_array().unwrap().len()
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
