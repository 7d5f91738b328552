//! Sweeps of the program, whose evaluations are shell scripts, and of the library.

mod failures;
mod files;
mod folders;
mod jobs;
mod joint;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{failure, load, names, posthoc_ema, stdout};
use posthoc_ema::{At, PostHocEma, Profile, Run};
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
