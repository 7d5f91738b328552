//! Planning before training: retention, disk size and advice.

use crate::common::{self, failure, posthoc_ema, stdout};
use serde_json::Value;

const TRAINING: [&str; 6] = ["plan", "--steps", "100000", "--checkpoint-every", "1000", "--json"];

fn json(arguments: &[&[&str]]) -> Value {
    common::json(&arguments.concat())
}

fn error(document: &Value) -> f64 {
    document["targets"][0]["relative_error"].as_f64().unwrap()
}

#[test]
fn retention_keeps_snapshots_that_serve_its_range() {
    let target = ["--sigma-rel", "0.2"];
    let default = json(&[&TRAINING, &target]);
    assert_eq!(default["targets"][0]["weights"].as_array().unwrap().len(), 40);
    let latest = json(&[&TRAINING, &target, &["--retention", "latest"]]);
    assert!(error(&default) < 0.0095 && error(&latest) > 0.2, "{default} {latest}");
    // A narrower range has smaller errors.
    let narrow = json(&[&TRAINING, &target, &["--retention", "0.15..0.22"]]);
    assert!(error(&narrow) < error(&default), "{narrow}");
}

#[test]
fn plan_reports_disk_if_parameters_are_given() {
    let flags = ["--sigma-rel", "0.2", "--parameters", "1B", "--checkpoint-dtype", "bf16"];
    // 21 steps of two profiles at 2 bytes, and the live state of 6 bytes for each profile twice.
    assert_eq!(json(&[&TRAINING, &flags])["disk"], 108_000_000_000u64);
    let text = stdout(&[&TRAINING[..5], &flags].concat());
    assert!(text.contains("takes at most 108.00 GB on disk"), "{text}");
}

#[test]
fn advice_fits_the_disk_and_matches_its_plan() {
    let request = ["--advise", "--parameters", "10M", "--checkpoint-dtype", "f16", "--disk", "1.1GB"];
    let training = ["plan", "--steps", "20000"];
    let document = json(&[&training, &request, &["--json"]]);
    let all = document["advice"].as_array().unwrap();
    let best = &document["best"];
    assert!(all.len() == 8 && all.contains(best), "{document}");
    assert!(best["disk"].as_u64().unwrap() <= 1_100_000_000);
    let number = |key: &str| best[key].to_string();
    let tracked: Vec<String> = best["sigma_rels"].as_array().unwrap().iter().map(Value::to_string).collect();
    let length = number("sigma_rel");
    let plan = json(&[
        &training,
        &["--json", "--checkpoint-dtype", "f16", "--parameters", "10M", "--track", &tracked.join(",")],
        &["--checkpoint-every", &number("checkpoint_every"), "--keep", &number("max_checkpoints")],
        &["--sigma-rel", &length],
    ]);
    assert_eq!(plan["disk"], best["disk"]);
    let rounding = plan["targets"][0]["noise_gain"].as_f64().unwrap() * 2.1e-4;
    let together = error(&plan).hypot(rounding);
    // The advised error is the largest of the last tenth of the training, not only of its end.
    let ratio = together / best["error"].as_f64().unwrap();
    assert!(ratio > 0.1 && ratio < 1.02, "{plan} {best}");
    let table = stdout(&[&training[..], &request].concat());
    assert!(table.contains("Within 1.10 GB: track 0.") && table.contains("max_checkpoints"), "{table}");
}

#[test]
fn advise_reports_bad_usage() {
    let request = ["plan", "--advise", "--steps", "20000", "--parameters", "10M"];
    for (more, part) in [
        (vec!["--disk", "1MB"], "1000000 bytes do not hold one step's snapshots of two profiles"),
        (vec!["--disk", "1GB", "--track", "0.1"], "'--advise' cannot be used with '--track <LIST>'"),
        (vec!["--disk", "1GB", "--keep", "7"], "'--advise' cannot be used with '--keep <N>'"),
        (vec!["--disk", "1GB", "--sigma-rel", "0.5"], "'--advise' cannot be used with '--sigma-rel <LIST>'"),
        (vec!["--disk", "1GB", "--retention", "latest"], "--retention FROM..TO"),
        (vec!["--disk", "many"], "`MANY` is not a unit"),
        (vec![], "--disk"),
    ] {
        let (status, text) = failure(&[&request[..], &more].concat());
        assert!(status == 2 && text.contains(part), "{more:?}: {text}");
    }
    let (status, text) = failure(&["plan", "--advise", "--steps", "100", "--disk", "1GB"]);
    assert!(status == 2 && text.contains("--parameters"), "{text}");
}

/// Returns the number of snapshots of a training, all kept, and the worst error over sigma_rel 0.05 to 0.28.
///
/// Updates are every 10 steps. The program's own default is to keep 20 snapshots.
fn worst_error(steps: u64, more: &[&str]) -> (usize, f64) {
    let steps = steps.to_string();
    let training = ["--steps", &steps, "--keep", "100", "--json"];
    let document = json(&[&["error"], &training, &["--sigma-rel", "0.05,0.06,...,0.28"], more]);
    let errors = document["errors"].as_array().unwrap().iter().map(|each| each["relative_error"].as_f64().unwrap());
    let plan = json(&[&["plan"], &training, &["--sigma-rel", "0.15"], more]);
    (plan["targets"][0]["weights"].as_array().unwrap().len() / 2, errors.fold(0.0, f64::max))
}

/// Compares with errors that were computed from the definitions, in percent.
#[test]
fn early_snapshots_bring_short_trainings_below_five_percent() {
    for (steps, even, growing) in [
        (1000, (1, 45.0), (14, 4.0)),
        (2000, (2, 29.5), (19, 4.1)),
        (3000, (3, 19.4), (22, 4.0)),
        (5000, (5, 9.5), (27, 2.8)),
        (10_000, (10, 2.8), (32, 2.8)),
    ] {
        let without = worst_error(steps, &["--snapshot-growth", "0"]);
        let with = worst_error(steps, &[]);
        for ((count, error), (expected_count, percent)) in [(without, even), (with, growing)] {
            assert_eq!(count, expected_count, "at step {steps}");
            assert!((100.0 * error - percent).abs() < 0.4, "{error} at step {steps}, not {percent}%");
        }
    }
    // Without the multiples of 1,000 before the end, as few snapshots as can be.
    for (steps, count, percent) in [(1000, 14, 4.02), (2000, 18, 4.13), (3000, 20, 4.08), (5000, 23, 4.05)] {
        let (found, error) = worst_error(steps, &["--checkpoint-every", &steps.to_string()]);
        assert_eq!(found, count, "at step {steps}");
        assert!((100.0 * error - percent).abs() < 0.02, "{error} at step {steps}, not {percent}%");
    }
}

#[test]
fn early_snapshots_count_for_disk_and_advice() {
    let training = ["plan", "--steps", "1000", "--sigma-rel", "0.2", "--parameters", "1B", "--json"];
    // 14 steps of two profiles at 4 bytes, and the live state of 6 bytes for each profile twice.
    assert_eq!(json(&[&training])["disk"], 136_000_000_000u64);
    // A single step without early snapshots.
    assert_eq!(json(&[&training, &["--snapshot-growth", "0"]])["disk"], 32_000_000_000u64);
    let advise = ["plan", "--advise", "--steps", "2000", "--parameters", "1M", "--disk", "100MB", "--json"];
    let worst = |more: &[&str]| json(&[&advise, more])["best"]["relative_error"].as_f64().unwrap();
    let (with, without) = (worst(&[]), worst(&["--snapshot-growth", "0"]));
    // The interval is free, so either is good; at the default interval the error is 4% with early ones and 30% without.
    assert!(with < 0.016 && without < 0.016, "{with} with early snapshots, {without} without");
    let (status, text) = failure(&["plan", "--steps", "1000", "--sigma-rel", "0.2", "--snapshot-growth", "1"]);
    assert!(status == 2 && text.contains("--snapshot-growth: 1: a factor of at least 1.01"), "{text}");
}

/// Returns the lines of stderr of a command that succeeds, and its output as JSON.
fn warned(arguments: &[&str]) -> (Vec<String>, Value) {
    let output = posthoc_ema(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{text}");
    (text.lines().map(str::to_owned).collect(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn large_error_is_warned_of_once_with_reason_and_remedy() {
    let training = ["--steps", "5000", "--snapshot-growth", "0", "--json"];
    // 27 targets have one warning for each reason.
    let (lines, document) = warned(&[&["error"], &training[..]].concat());
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("warning: sigma_rel 0.02 at step 5000 has a relative error of"), "{lines:?}");
    assert!(lines[0].ends_with("tracked sigma_rel 0.05 to 0.28: ask for one within, or track it in the next training"));
    assert!(lines[1].contains("averages of 5 steps, 1000 to 5000, are too few so far: store them more often"));
    assert!(document["errors"][0]["warning"].as_str().unwrap().contains("outside of the tracked"));
    assert_eq!(document["errors"][3]["warning"], Value::Null);
    let (lines, document) = warned(&[&["plan", "--sigma-rel", "0.15", "--at", "4990"], &training[..]].concat());
    assert_eq!(lines.len(), 1, "{lines:?}");
    let reason = "the step lies between snapshots: ask for step 5000, the nearest that is stored";
    assert!(lines[0].starts_with("warning: sigma_rel 0.15 at step 4990") && lines[0].ends_with(reason), "{lines:?}");
    assert_eq!(document["targets"][0]["warning"], reason);
    assert!(warned(&["plan", "--steps", "5000", "--sigma-rel", "0.05,0.15,0.28", "--json"]).0.is_empty());
}

#[test]
fn synthesis_and_sweep_warn_once() {
    let (temp, dir) = common::run();
    let path = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let between = ["--at", "490", "--sigma-rel", "0.1,0.15", "--json"];
    let (lines, document) = warned(&[&["synthesize", &dir, "--out-dir", &path("averages")], &between[..]].concat());
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("and 1 more target of more than 5%: the step lies between snapshots: ask for step 500"));
    assert!(document["targets"][1]["warning"].as_str().unwrap().contains("ask for step 500"));
    let sweep = ["sweep", &dir, "--out-dir", &path("sweep"), "--eval", "echo {} 1", "--refine", "2"];
    let (lines, _) = warned(&[&sweep[..], &between].concat());
    assert_eq!(lines.iter().filter(|line| line.contains("lies between snapshots")).count(), 1, "{lines:?}");
}

#[test]
fn named_movement_and_another_run_predict_errors_before_training() {
    let (_temp, dir) = common::run();
    let training = ["plan", "--steps", "20000", "--sigma-rel", "0.15", "--json"];
    let target = |more: &[&str]| json(&[&training, more])["targets"][0].clone();
    let part = |target: &Value, part: &str| target["predicted"][part].as_f64().unwrap();
    let (small, large) = (target(&["--movement", "walk:0.3"]), target(&["--movement", "walk:0.6"]));
    assert!((part(&large, "profile") / part(&small, "profile") - 2.0).abs() < 1e-9, "{small} {large}");
    assert_eq!((&small["relative_error"], &small["no_prediction"]), (&target(&[])["relative_error"], &Value::Null));
    let coarse = target(&["--movement", "walk:0.3", "--checkpoint-dtype", "bf16"]);
    assert!(part(&coarse, "rounding") > 1e4 * part(&small, "rounding"));
    let short = ["plan", "--steps", "20000", "--sigma-rel", "0.02", "--json", "--checkpoint-dtype", "bf16"];
    let auto = json(&[&short, &["--movement", "noise:0.3", "--noise", "auto"]])["targets"][0].clone();
    assert!(auto["rho"].as_f64().unwrap() > 0.0, "{auto}");
    let like = target(&["--like", &dir]);
    assert!(part(&like, "total") > 0.0 && like["worst_group"]["tensors"].is_array(), "{like}");

    let refused = |more: &[&str]| failure(&[&training, more].concat());
    let (status, text) = refused(&["--movement", "run:0.3"]);
    assert!(status == 2 && text.contains("`run` is not a kind of movement: use walk, cosine, line"), "{text}");
    let (status, text) = refused(&["--noise", "auto"]);
    assert!(status == 2 && text.contains("--movement") && text.contains("--like"), "{text}");
    assert_eq!(refused(&["--movement", "walk", "--like", &dir]).0, 2);
    assert!(refused(&["--like", "/no such run"]).1.contains("/no such run"));

    let advise = ["plan", "--advise", "--steps", "200", "--parameters", "1M", "--disk", "40MB", "--movement", "walk"];
    let text = stdout(&advise);
    assert!(text.lines().next().unwrap().trim_end().ends_with("predicted error"), "{text}");
}
