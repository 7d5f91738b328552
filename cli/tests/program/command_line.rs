//! The commands of the binary.

use std::fs;
use std::path::Path;

use crate::common::{failure, json, load, names, posthoc_ema, run, stdout, train_from};
use posthoc_ema::{At, Noise, PostHocEma, Profile, Run};
use serde_json::Value;

#[test]
fn help_texts_match_the_golden_files() {
    let bless = std::env::var_os("BLESS").is_some();
    for command in [
        "",
        "synthesize",
        "sweep",
        "plan",
        "inspect",
        "error",
        "profile",
        "verify",
        "average",
        "import",
        "bench",
        "completions",
    ] {
        let arguments: Vec<&str> = [command, "--help"].into_iter().filter(|word| !word.is_empty()).collect();
        let text = stdout(&arguments);
        let name = if command.is_empty() { "posthoc-ema" } else { command };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/help/{name}.txt"));
        if bless {
            fs::write(&path, &text).unwrap();
        }
        let recorded = fs::read_to_string(&path).unwrap();
        assert_eq!(text, recorded, "{name}: run the tests with BLESS=1 to record the new text");
    }
}

#[test]
fn synthesize_writes_the_bits_of_the_library() {
    let (temp, dir) = run();
    let out = temp.path().join("ema.safetensors");
    let document = json(&["synthesize", &dir, "--sigma-rel", "0.15", "-o", out.to_str().unwrap(), "--json"]);
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap();
    assert_eq!(load(&out), run.load(&plan).unwrap());
    let target = &document["targets"][0];
    assert_eq!(target["path"], out.to_str().unwrap());
    assert_eq!(target["relative_error"], plan.relative_error);
    assert_eq!(target["at"], 500);
    // 10 steps, 2 profiles, 1,010 parameters of 2 bytes.
    assert_eq!(document["bytes_read"], 40_400);
}

#[test]
fn out_dir_gets_a_file_for_each_target() {
    let (temp, dir) = run();
    let out = temp.path().join("deep/averages");
    let arguments = ["synthesize", &dir, "--sigma-rel", "0.05,0.06,...,0.1", "--half-life", "40", "--uniform", "20%"];
    let rest = ["--at", "400", "--dtype", "bf16", "--out-dir", out.to_str().unwrap()];
    let text = stdout(&[&arguments[..], &rest[..]].concat());
    let names = names(&out);
    assert_eq!(names.len(), 8);
    assert_eq!(names[1], "sigma_rel-0.05.step-400.safetensors");
    assert!(names.iter().all(|name| text.contains(name)));
    let average = load(&out.join("uniform-20%.step-400.safetensors"));
    assert!(average.iter().all(|(_, tensor)| tensor.dtype == posthoc_ema::Dtype::BF16));
}

#[test]
fn plan_json_has_weights_and_errors_of_each_target() {
    let (_temp, dir) = run();
    let document = json(&["plan", &dir, "--sigma-rel", "0.05,0.1", "--lr-decay", "cosine:25%", "--json"]);
    let targets = document["targets"].as_array().unwrap();
    assert_eq!(targets.len(), 3);
    for target in targets {
        assert_eq!(target["weights"].as_array().unwrap().len(), 20);
        let sum: f64 = target["weights"].as_array().unwrap().iter().map(|w| w["weight"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-9 && (target["sum"].as_f64().unwrap() - 1.0).abs() < 1e-9);
        assert!(target["noise_gain"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(targets[0]["profile"]["kind"], "power");
    assert_eq!(targets[0]["weights"][0]["index"], 0);
    assert_eq!(targets[0]["weights"][0]["step"], 50);
    assert!(targets[0]["relative_error"].as_f64().unwrap() < 1e-9);
    // A single target is shown with its weights.
    let text = stdout(&["plan", &dir, "--sigma-rel", "0.1"]);
    assert!(text.contains("relative error") && text.contains("1.500"), "{text}");
}

#[test]
fn plan_before_training_equals_the_plan_of_the_run() {
    let (_temp, dir) = run();
    let targets = ["--sigma-rel", "0.07,0.15", "--json"];
    let flags = ["plan", "--steps", "500", "--checkpoint-every", "50", "--snapshot-growth", "0"];
    let before = json(&[&flags[..], &targets[..]].concat());
    let mut after = json(&[&["plan", &dir][..], &targets[..]].concat());
    // Nothing is known of the movement before training.
    for target in after["targets"].as_array_mut().unwrap() {
        assert!(target["predicted"]["total"].as_f64().unwrap() > 0.0);
        assert_eq!(target["worst_group"]["tensors"], serde_json::json!(["layer.bias"]));
        target["predicted"] = Value::Null;
        target["no_prediction"] = before["targets"][0]["no_prediction"].clone();
        target.as_object_mut().unwrap().remove("worst_group");
    }
    assert_eq!(before, after);
    let text = stdout(&[&flags[..], &targets[..2]].concat());
    assert!(text.contains("No error is predicted: before training nothing is known of the movement"), "{text}");
}

/// Snapshots in f16 of a model that moves little: a short average is mostly their rounding.
#[test]
fn noise_auto_lowers_the_predicted_error() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run").to_str().unwrap().to_owned();
    train_from(dir.as_ref(), 0.5);
    let total = |target: &Value| target["predicted"]["total"].as_f64().unwrap();
    let targets = ["--sigma-rel", "0.01,0.05", "--json"];
    let plain = json(&[&["plan", &dir][..], &targets].concat());
    let auto = json(&[&["plan", &dir, "--noise", "auto"][..], &targets].concat());
    let plain = &plain["targets"];
    let auto = &auto["targets"];
    assert_eq!((&plain[0]["rho"], &plain[1]), (&Value::from(0.0), &auto[1]));
    assert!(auto[0]["rho"].as_f64().unwrap() > 0.0 && total(&auto[0]) < 0.9 * total(&plain[0]), "{auto}");
    let parts = |part: &str| auto[0]["predicted"][part].as_f64().unwrap();
    assert!((parts("profile").hypot(parts("rounding")) / total(&auto[0]) - 1.0).abs() < 1e-12);

    // The same regularisation by its number gives the same weights, and a synthesis writes them.
    let rho = auto[0]["rho"].to_string();
    let by_number = json(&["plan", &dir, "--noise", &rho, "--sigma-rel", "0.01", "--json"]);
    assert_eq!(by_number["targets"][0], auto[0]);
    let out = temp.path().join("ema.safetensors");
    let target = ["--sigma-rel", "0.01", "--noise", "auto", "-o", out.to_str().unwrap()];
    let written = json(&[&["synthesize", &dir, "--json"][..], &target].concat());
    assert_eq!(written["targets"][0]["predicted"], auto[0]["predicted"]);
    let run = Run::open(&dir).unwrap();
    let plan = run.plans_with(&[Profile::sigma_rel(0.01).unwrap()], At::Latest, Noise::Auto).unwrap().remove(0);
    assert_eq!(load(&out), run.load(&plan).unwrap());
    let errors = json(&["error", &dir, "--sigma-rel", "0.01", "--noise", "auto", "--json"]);
    assert_eq!(errors["errors"][0]["predicted"], auto[0]["predicted"]);
    let text = stdout(&["plan", &dir, "--sigma-rel", "0.01"]);
    assert!(text.contains("predicted error") && text.contains("by rounding"), "{text}");
    // Two steps are too few to predict from.
    let early = json(&["plan", &dir, "--sigma-rel", "0.1", "--at", "100", "--noise", "auto", "--json"]);
    assert_eq!((&early["targets"][0]["predicted"], &early["targets"][0]["rho"]), (&Value::Null, &Value::from(0.0)));
    let text = stdout(&["error", &dir, "--sigma-rel", "0.1,0.2", "--at", "100"]);
    assert_eq!(text.matches("No error is predicted: averages of 2 steps do not show").count(), 1, "{text}");
}

#[test]
fn error_lists_the_error_of_each_length() {
    let (_temp, dir) = run();
    let document = json(&["error", &dir, "--json"]);
    let errors = document["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 27);
    assert_eq!(errors[3]["sigma_rel"], 0.05);
    assert!(errors[3]["relative_error"].as_f64().unwrap() < 1e-9);
    let flags = ["error", "--steps", "1000000", "--sigma-rel", "0.15"];
    let text = stdout(&flags);
    assert!(text.contains("0.00767"), "{text}");
    let text = stdout(&[&flags[..], &["--snapshot-growth", "0"]].concat());
    assert!(text.contains("0.0067"), "{text}");
    let text = stdout(&[&flags[..], &["--retention", "latest"]].concat());
    assert!(text.contains("0.41"), "{text}");
}

#[test]
fn inspect_lists_sound_and_damaged_snapshots() {
    let (_temp, dir) = run();
    let text = stdout(&["inspect", &dir]);
    assert!(text.contains("20 snapshots at 10 steps (steps 50 to 500)"), "{text}");
    let document = json(&["inspect", &dir, "--json"]);
    assert_eq!(document["snapshots"][0]["parameters"], 1010);
    assert_eq!(document["trouble"], Value::Null);
    // A build with CUDA names its devices, or the reason why there is none.
    assert_eq!(document["cuda"].as_object().unwrap().is_empty(), !cfg!(feature = "cuda"));
    assert_eq!(text.contains("\ncuda"), cfg!(feature = "cuda"), "{text}");

    let path = Path::new(&dir).join("1.200.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let output = posthoc_ema(&["inspect", &dir]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("damaged"));
    assert!(String::from_utf8(output.stderr).unwrap().contains("1.200.safetensors"));
}

/// Files that a rewind sets aside are named. They are neither an error nor part of the run.
#[test]
fn left_course_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, state) = (temp.path().join("run"), temp.path().join("state"));
    let model = |step: u64| vec![("weight", vec![step as f32; 8])];
    let options = || PostHocEma::options(&dir).update_every(1).checkpoint_every(10).snapshot_growth(None);
    let mut ema = options().create(&model(0)).unwrap();
    for step in 1..=40 {
        ema.update(&model(step)).unwrap();
        if step == 25 {
            ema.save_to(&state).unwrap();
        }
    }
    ema.finish().unwrap();
    drop(ema);
    drop(options().resume_from(&state, &model(25)).unwrap());
    let run = dir.to_str().unwrap();
    let named = "4 snapshots of steps 30 to 40 and a live state of a course that was left are set aside";
    let inspected = stdout(&["inspect", run]);
    assert!(inspected.contains("4 snapshots at 2 steps (steps 10 to 20)") && inspected.contains(named), "{inspected}");
    let verified = stdout(&["verify", run]);
    assert!(
        verified.contains("5 files (") && verified.contains("0 findings") && verified.contains(named),
        "{verified}"
    );
    for command in ["inspect", "verify"] {
        let left = &json(&[command, run, "--json"])["aside"][0];
        assert_eq!((left["snapshots"].as_array().unwrap().len(), &left["state"]), (4, &Value::Bool(true)));
    }
    let planned = json(&["plan", run, "--sigma-rel=0.1", "--json"]);
    assert_eq!(planned["targets"][0]["at"], 20);
}

#[test]
fn verify_finds_flipped_bits_and_truncated_files() {
    let (_temp, dir) = run();
    assert!(stdout(&["verify", &dir]).contains("21 files ("));
    let path = Path::new(&dir).join("0.350.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    // A truncated file does not stop the verification of the others.
    let path = Path::new(&dir).join("1.50.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let output = posthoc_ema(&["verify", &dir, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let damaged: Vec<&str> =
        document["damaged"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert_eq!(damaged.len(), 2, "{damaged:?}");
    assert!(damaged[0].contains("1.50.safetensors") && damaged[1].contains("0.350.safetensors"), "{damaged:?}");
    assert_eq!(document["files"], 21);
}

#[test]
fn profile_converts_between_parametrisations() {
    let text = stdout(&["profile", "--sigma-rel", "0.1", "--steps", "10000"]);
    assert!(text.contains("6.9372039376018") && text.contains("0.999"), "{text}");
    let document = json(&["profile", "--beta", "0.999,0.9999", "--steps", "10000", "--json"]);
    let profiles = document["profiles"].as_array().unwrap();
    assert!((profiles[0]["sigma_rel"].as_f64().unwrap() - 0.1).abs() < 1e-9);
    // At this length 0.9999 is longer than the plain mean.
    assert_eq!(profiles[1]["sigma_rel"], Value::Null);
    assert!((profiles[0]["half_life"].as_f64().unwrap() - 692.8).abs() < 0.1);
}

#[test]
fn profile_csv_is_read_and_errors_name_the_row() {
    let (temp, dir) = run();
    let csv = temp.path().join("profile.csv");
    fs::write(&csv, "time, share\n# a comment\n0.5, 0.1\n1, 1\n").unwrap();
    let text = stdout(&["plan", &dir, "--profile-csv", csv.to_str().unwrap()]);
    assert!(text.contains("table of 3 points"), "{text}");
    fs::write(&csv, "0.5, 0.1\n0.6, x\n1, 1\n").unwrap();
    let (status, text) = failure(&["plan", &dir, "--profile-csv", csv.to_str().unwrap()]);
    assert!(status == 1 && text.contains("row 2"), "{text}");
}

#[test]
fn tables_of_equal_length_get_different_files() {
    let (temp, dir) = run();
    let csv = temp.path().join("profile.csv");
    fs::write(&csv, "0.5,0.1\n1,1\n").unwrap();
    let csv = csv.to_str().unwrap();
    let out = temp.path().join("out");
    let arguments =
        ["synthesize", &dir, "--profile-csv", csv, "--profile-csv", csv, "--out-dir", out.to_str().unwrap()];
    stdout(&arguments);
    assert_eq!(fs::read_dir(out).unwrap().count(), 2);
}

/// Arguments of a fast measurement.
const SMALL: [&str; 10] =
    ["bench", "--device", "cpu", "--parameters", "10000", "--tensors", "30", "--snapshots", "3", "--repeats=2"];

#[test]
fn bench_prints_and_draws_every_measurement() {
    let temp = tempfile::tempdir().unwrap();
    let plot = temp.path().join("plot.svg");
    let document = json(&[&SMALL[..], &["--plot", plot.to_str().unwrap(), "--json"]].concat());
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    assert!(document["machine"]["threads"].as_u64().unwrap() > 0);
    assert_eq!(document["options"]["parameters"], 10_000);
    let rows = document["measurements"].as_array().unwrap();
    let of = |work: &str| rows.iter().filter(|row| row["work"] == work).count();
    assert_eq!((of("limit"), of("update"), of("blend")), (5, 8, 6));
    for row in rows {
        assert_eq!(row["device"], "cpu");
        assert_eq!(row["seconds_all"].as_array().unwrap().len(), 2);
        assert!(row["bytes_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(row["share_of_limit"].is_null(), row["work"] == "limit");
    }
    let compensated = rows.iter().find(|row| row["name"] == "f32, compensated, 30 tensors").unwrap();
    // Reads a parameter, and reads and writes two averages of 6 bytes.
    assert_eq!(compensated["bytes"], 10_000 * (4 + 2 * 2 * 6));
    let svg = fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("f32, compensated, 30 tensors"), "{svg}");

    let text = stdout(&[&SMALL[..], &["--targets", "2"]].concat());
    assert!(text.contains("3 f16 snapshots to 2 targets") && text.contains("3 streams added up, 2 written"), "{text}");
    assert_eq!(text.lines().count(), 20);
}

#[test]
fn bench_reports_why_it_measures_no_cuda_device() {
    let output = posthoc_ema(&[&["bench", "--device", "auto"], &SMALL[3..]].concat());
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("cuda:0") || why.starts_with("no CUDA device was measured: "), "{text}{why}");
    let number = u32::MAX.to_string();
    let (status, text) = failure(&["bench", "--device", &format!("cuda:{number}")]);
    assert!(status == 1 && text.contains(&number) && text.lines().count() == 1, "{text}");
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(stdout(&["completions", shell]).contains("synthesize"));
    }
}

#[test]
fn bad_usage_exits_with_2_and_names_the_fix() {
    let (_temp, dir) = run();
    let dir = dir.as_str();
    for (arguments, part) in [
        (vec!["synthesize"], "<RUN>"),
        (vec!["synthesize", dir, "-o", "x"], "no target"),
        (vec!["synthesize", dir, "--sigma-rel", "0.1"], "nowhere to write"),
        (vec!["synthesize", dir, "--sigma-rel", "0.1,0.2", "-o", "x"], "--out-dir"),
        (vec!["synthesize", dir, "--sigma-rel", "0.1", "-o", "x", "--device", "tpu"], "auto, cpu, cuda and cuda:N"),
        (vec!["synthesize", dir, "--sigma-rel", "0.1", "-o", "x", "--dtype", "i8"], "bf16"),
        (vec!["plan", dir, "--sigma-rel", "0"], "sigma_rel = 0"),
        (vec!["plan", dir, "--sigma-rel", "-0.1"], "sigma_rel = -0.1"),
        (vec!["plan", dir, "--sigma-rel", "NaN"], "sigma_rel = NaN"),
        (vec!["plan", dir, "--sigma-rel", "0.3"], "the plain mean of all updates"),
        (vec!["plan", dir, "--sigma-rel", "0.1,...,0.2"], "two numbers before"),
        (vec!["plan", dir, "--beta", "1"], "above 0 and below 1"),
        (vec!["plan", dir, "--lr-decay", "steps:10"], "linear, cosine and 1-sqrt"),
        (vec!["plan", dir, "--uniform", "150%"], "at most 1"),
        (vec!["plan", dir, "--steps", "100", "--sigma-rel", "0.1"], "cannot be used with"),
        (vec!["plan", dir, "--sigma-rel", "0.1", "--keep", "5"], "cannot be used with"),
        (vec!["plan", "--sigma-rel", "0.1"], "--steps"),
        (vec!["plan", "--steps", "99", "--sigma-rel", "0.1"], "no snapshot is left"),
        (vec!["plan", "--steps", "10000", "--update-every", "0", "--sigma-rel", "0.1"], "--update-every: "),
        (vec!["plan", "--steps", "1000000000000", "--update-every", "1", "--sigma-rel", "0.1"], "longer interval"),
        (vec!["plan", "--steps", "10000", "--noise", "auto", "--sigma-rel", "0.1"], "name it with --movement"),
        (vec!["error", "--steps", "10000", "--noise", "auto"], "name it with --movement"),
        (vec!["plan", dir, "--noise", "on", "--sigma-rel", "0.1"], "off, auto or a number"),
        (vec!["plan", dir, "--noise", "-1", "--sigma-rel", "0.1"], "0 or more"),
        (vec!["profile"], "no profile"),
        (vec!["bench", "--parameters", "0"], "1 or more"),
        (vec!["bench", "--tensors", "3", "--parameters", "2"], "at most 2"),
        (vec!["bench", "--device", "tpu"], "auto, cpu, cuda and cuda:N"),
        (vec!["bench", "--plot", "plot.pdf"], "ends in .svg or .png"),
        (vec!["frobnicate"], "unrecognized subcommand"),
    ] {
        let (status, text) = failure(&arguments);
        assert!(status == 2 && text.contains(part), "{arguments:?}: {status} {text}");
    }
}

#[test]
fn failures_exit_with_1_and_leave_no_file() {
    let (temp, dir) = run();
    let path = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("empty")).unwrap();
    let empty = path("empty");
    let none = path("none");
    let out = path("out");
    let inside = format!("{dir}/out.safetensors");
    for (arguments, part) in [
        (vec!["plan", &none, "--sigma-rel", "0.1"], "does not exist"),
        (vec!["plan", &empty, "--sigma-rel", "0.1"], "no snapshot in it"),
        (vec!["inspect", &empty], "no snapshot in it"),
        (vec!["plan", &dir, "--sigma-rel", "0.1", "--at", "501"], "after the last snapshot (step 500)"),
        (vec!["plan", &dir, "--sigma-rel", "0.1", "--at", "49"], "before the first snapshot (step 50)"),
        (vec!["plan", &dir, "--uniform", "501"], "no longer than the target time"),
        (vec!["synthesize", &dir, "--sigma-rel", "0.1", "-o", &inside], "write elsewhere"),
        (vec!["synthesize", &dir, "--sigma-rel", "0.1", "-o", "/nonexistent/x"], "/nonexistent/x"),
        (vec!["synthesize", &dir, "--sigma-rel", "0.1", "-o", &empty], "name a file in it"),
        // Fails without CUDA, and with it since no machine has that device.
        (vec!["synthesize", &dir, "--sigma-rel", "0.1", "-o", &out, "--device", "cuda:4096"], "cuda:4096"),
        (vec!["synthesize", &dir, "--sigma-rel", "0.1,0.1", "--out-dir", &out], "two targets"),
    ] {
        let (status, text) = failure(&arguments);
        assert!(status == 1 && text.contains(part), "{arguments:?}: {status} {text}");
        assert_eq!(text.lines().count(), 1, "one error, not a backtrace: {text}");
    }
    let left = fs::read_dir(&out).map(Iterator::count).unwrap_or(0);
    assert_eq!(left, 0);
}

/// The checkpoints of pytorch-posthoc-ema are of a ramp from 0 to 1. Its own average of sigma_rel 0.15 is 0.244.
#[test]
fn imported_checkpoints_give_the_average_of_the_profile() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    let out = temp.path().join("ema.safetensors");
    let run = run.to_str().unwrap();
    let options = ["--from", "pytorch-posthoc-ema", "--sigma-rels", "0.05,0.28", "--update-every", "10"];
    let document = json(&[&["import", &foreign("ramp"), run][..], &options, &["--json"]].concat());
    assert_eq!(document["snapshots"], 40);
    assert_eq!(document["steps"][19], 20_000);
    assert_eq!(document["profiles"][0]["kind"], "power");
    assert_eq!(document["warnings"], Value::Array(vec![]));
    assert!(document["bytes_written"].as_u64().unwrap() > 40 * 4096);
    stdout(&["verify", run]);
    stdout(&["synthesize", run, "--sigma-rel", "0.15", "-o", out.to_str().unwrap()]);
    let weight = load(&out).get("weight").unwrap().to_vec::<f32>().unwrap();
    assert!((weight[0] - 0.820).abs() < 1e-3, "{weight:?}");
}

#[test]
fn import_reports_summary_warnings_and_errors() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run").to_str().unwrap().to_owned();
    let options = ["--from", "pytorch-posthoc-ema", "--gammas", "16.97,0.083", "--update-every", "10"];
    let output = posthoc_ema(&[&["import", &foreign("prefixed"), &run][..], &options].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && text.contains("at 3 steps (191 to 591)"), "{text}");
    assert!(why.starts_with("warning: `norm.running_mean` is the same") && why.lines().count() == 1, "{why}");

    let none = temp.path().join("none").to_str().unwrap().to_owned();
    let ramp = foreign("ramp");
    let usual = ["--from", "pytorch-posthoc-ema", "--sigma-rels", "0.05,0.28", "--update-every", "10"];
    for (arguments, expected, part) in [
        (vec!["import", &ramp, &none, "--from", "keras", "--update-every", "10"], 2, "ema-pytorch"),
        (vec!["import", &ramp, &none, "--from", "ema-pytorch", "--update-every", "10"], 2, "--sigma-rels"),
        ([&["import", &ramp, &none], &usual[..4], &["--update-every", "0"]].concat(), 2, "--update-every: "),
        ([&["import", &ramp, &none], &usual[..4]].concat(), 2, "--update-every"),
        ([&["import", &ramp, &none], &usual[..], &["--step-size-correction"]].concat(), 2, "no such option"),
        ([&["import", &ramp, &none], &usual[..], &["--update-after-step", "0"]].concat(), 1, "100 would fit"),
        ([&["import", &ramp, &run], &usual[..]].concat(), 1, "already holds a run"),
        ([&["import", &none, &none], &usual[..]].concat(), 1, "check the path"),
    ] {
        let (status, text) = failure(&arguments);
        assert!(status == expected && text.contains(part), "{arguments:?}: {status} {text}");
    }
    assert!(!Path::new(&none).exists());
}

/// A file size limit stands for a full disk.
#[test]
fn import_on_a_full_disk_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("deep/run");
    let limit = "ulimit -f 2; trap '' XFSZ; exec \"$@\"";
    let options = ["--from", "ema-pytorch", "--sigma-rels", "0.05,0.28", "--update-every", "10"];
    let arguments = ["-c", limit, "sh", env!("CARGO_BIN_EXE_posthoc-ema"), "import"];
    let mut command = std::process::Command::new("sh");
    let output = command.args(arguments).arg(foreign("ema")).arg(&run).args(options).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("File too large") && text.lines().count() == 1, "{text}");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
}

/// Returns the path of checkpoints that another tool wrote.
fn foreign(case: &str) -> String {
    format!("{}/../tests/data/foreign/{case}", env!("CARGO_MANIFEST_DIR"))
}

/// A file size limit stands for a full disk.
#[test]
fn synthesize_on_a_full_disk_leaves_nothing() {
    let (temp, dir) = run();
    let limit = "ulimit -f 4; trap '' XFSZ; exec \"$@\"";
    let out = temp.path().join("out.safetensors");
    let program = env!("CARGO_BIN_EXE_posthoc-ema");
    let arguments = ["-c", limit, "sh", program, "synthesize", &dir, "--sigma-rel", "0.1", "--dtype", "f64", "-o"];
    let output = std::process::Command::new("sh").args(arguments).arg(&out).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(1) && text.contains("out.safetensors") && text.contains("File too large"),
        "{text}"
    );
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}
