//! `import --from averages`: the program on a series of an EMA that a training kept.

use std::fs;
use std::path::Path;

use crate::common::{failure, json, posthoc_ema};

/// Saves one number as a safetensors file.
fn save(path: &Path, value: f32) {
    let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
    let length = (header.len() as u64).to_le_bytes();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, [&length[..], header, &value.to_le_bytes()].concat()).unwrap();
}

/// Averages a ramp 0..1 with a decay of 0.95, stored every 10 steps with the raw weights.
fn series(out: &Path) {
    let mut average = 0.01;
    for step in 1..=100 {
        let raw = f64::from(step) / 100.0;
        average = if step == 1 { raw } else { 0.95 * average + 0.05 * raw };
        if step % 10 == 0 {
            save(&out.join(format!("step-{step}/ema/model.safetensors")), average as f32);
            save(&out.join(format!("step-{step}/raw/model.safetensors")), raw as f32);
        }
    }
}

#[test]
fn series_of_averages_becomes_a_run() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let (out, run) = (path("out"), path("run"));
    series(Path::new(&out));
    let options = ["--from", "averages", "--key", "ema", "--beta", "0.95", "--update-every", "1"];
    let document = json(&[&["import", &out, &run][..], &options, &["--raw", "raw", "--json"]].concat());
    assert_eq!((&document["snapshots"], &document["steps"][9]), (&20.into(), &100.into()));
    let plan = json(&["plan", &run, "--beta", "0.97", "--json"]);
    let error = plan["targets"][0]["relative_error"].as_f64().unwrap();
    assert!(error > 0.0 && error < 0.3, "{error}");
    let listed = posthoc_ema(&["inspect", &run]);
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(text.contains("beta 0.95") && text.contains("raw weights"), "{text}");

    let usual = ["--from", "averages", "--key", "ema"];
    for (given, status, part) in [
        (&["--beta", "0.95"][..], 2, "--update-every: the files do not record it"),
        (&["--update-every", "1"], 2, "--beta: the files do not record it: give the decay of the training"),
        (&["--ramp", "linear"], 2, "exponential:TAU"),
        (&["--ramp", "ratio", "--update-every", "1"], 2, "give its decay with --beta"),
        (&["--beta", "0.95", "--update-every", "1", "--step-size-correction"], 2, "nitrous-ema"),
        (&["--beta", "0.95", "--update-every", "1", "--steps", "0.5"], 2, "--steps: 0.5 is not a step"),
    ] {
        let none = path("none");
        let (found, text) = failure(&[&["import", &out, &none][..], &usual, given].concat());
        assert!(found == status && text.contains(part), "{given:?}: {found} {text}");
        assert!(!Path::new(&none).exists());
    }
    let other = ["--from", "ema-pytorch", "--sigma-rels", "0.1", "--update-every", "10", "--key", "ema"];
    let (status, text) = failure(&[&["import", &out, &path("none")][..], &other].concat());
    assert!(status == 2 && text.contains("--key is for --from averages"), "{text}");
}
