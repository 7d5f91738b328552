//! Pictures that the commands draw.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{failure, json, names, posthoc_ema, run, stdout};
use resvg::tiny_skia::Pixmap;

/// Returns the SVG that a command draws, after a check of its PNG.
fn draw(arguments: &[&str]) -> String {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let svg = path("picture.svg");
    let png = path("picture.PNG");
    stdout(&[arguments, &["--plot", &svg, "--plot", &png]].concat());
    let svg = fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
    check_png(Path::new(&png), size(&svg));
    svg
}

fn size(svg: &str) -> (u32, u32) {
    let attribute = |name: &str| svg.split(name).nth(1).unwrap().split('"').nth(1).unwrap().parse().unwrap();
    (attribute("width="), attribute("height="))
}

/// Checks that a PNG has twice the size, white corners, and ink at the title.
fn check_png(path: &Path, (width, height): (u32, u32)) {
    let pixels = Pixmap::decode_png(&fs::read(path).unwrap()).unwrap();
    assert_eq!((pixels.width(), pixels.height()), (2 * width, 2 * height));
    let red = |x: u32, y: u32| pixels.pixel(x, y).unwrap().red();
    assert_eq!((red(0, 0), red(2 * width - 1, 2 * height - 1)), (255, 255));
    let title = (10..50).flat_map(|y| (20..120).map(move |x| (x, y)));
    let dark = title.filter(|&(x, y)| red(x, y) < 128).count();
    assert!(dark > 50, "{}: {dark} dark pixels where the title is", path.display());
}

/// Returns the texts of an SVG.
fn texts(svg: &str) -> Vec<String> {
    let of = |part: &str| part.split('>').nth(1).unwrap().split("</text").next().unwrap().trim().to_owned();
    svg.split("<text").skip(1).map(of).collect()
}

#[test]
fn error_picture_labels_the_worst_length() {
    let (_temp, dir) = run();
    let svg = draw(&["error", &dir]);
    let texts = texts(&svg);
    for text in ["run, at step 500", "tracked 0.05", "tracked 0.28", "rounding of the f16 snapshots", "relative error"]
    {
        assert!(texts.iter().any(|own| own == text), "{text}: {texts:?}");
    }
    // The label has the worst error of a fine grid between the tracked lengths.
    let document = json(&["error", &dir, "--sigma-rel", "0.05,0.051,...,0.28", "--json"]);
    let errors = document["errors"].as_array().unwrap().iter().map(|point| point["relative_error"].as_f64().unwrap());
    let worst = errors.fold(0.0, f64::max);
    let label = texts.iter().find(|text| text.starts_with("worst")).unwrap();
    let shown: f64 = label.trim_start_matches("worst in between ").split('%').next().unwrap().parse().unwrap();
    // Two digits are shown, and the grids differ slightly near the flat maximum.
    assert!((shown / (100.0 * worst) - 1.0).abs() < 0.06, "{label}: {worst}");
}

#[test]
fn error_picture_before_training_marks_tracked_profiles() {
    let flags =
        ["error", "--steps", "30000", "--track", "0.06", "--track-beta", "0.9998", "--checkpoint-dtype", "bf16"];
    let texts = texts(&draw(&flags));
    // The mark of a classical EMA is at its standard deviation: 1 / (2e-4 * 30000) = 0.167.
    for text in [
        "30000 steps, a snapshot every 1000, 20 kept, at step 30000",
        "tracked beta 0.9998",
        "rounding of the bf16 snapshots",
    ] {
        assert!(texts.iter().any(|own| own == text), "{text}: {texts:?}");
    }
    // A single length, tracked and not tracked.
    assert!(draw(&["error", "--steps", "30000", "--sigma-rel", "0.05"]).contains("tracked 0.05"));
    assert!(!draw(&["error", "--steps", "30000", "--sigma-rel", "0.1"]).contains("tracked"));
}

#[test]
fn plan_picture_has_a_panel_for_each_target() {
    let (_temp, dir) = run();
    let svg = draw(&["plan", &dir, "--sigma-rel", "0.15"]);
    let texts = texts(&svg);
    for text in ["sigma_rel 0.15 at step 500", "target", "synthesized", "difference", "weights of", "step"] {
        assert_eq!(texts.iter().filter(|own| *own == text).count(), 1, "{text}: {texts:?}");
    }
    // The rounding of f16, 2.07e-4, times the noise gain, as four digits and as two.
    let heading = texts.iter().find(|text| text.contains("f16 rounding: ")).unwrap();
    let after =
        |part: &str| heading.split(part).nth(1).unwrap().split([' ', '%']).next().unwrap().parse::<f64>().unwrap();
    let gain = after("noise gain ");
    let rounding = after("f16 rounding: ");
    assert!((100.0 * 2.0735e-4 * gain - rounding).abs() <= 0.0051, "{heading}");
    let several = draw(&["plan", &dir, "--sigma-rel", "0.05,0.1", "--uniform", "100", "--at", "425"]);
    assert_eq!(several.matches("synthesized").count(), 3);
    assert_eq!(size(&several).0, 2 * size(&svg).0);
}

#[test]
fn inspect_picture_crosses_damaged_snapshots() {
    let (temp, dir) = run();
    let svg = draw(&["inspect", &dir]);
    for text in ["sigma_rel 0.05", "sigma_rel 0.28", "newest update 500", "live state"] {
        assert!(texts(&svg).iter().any(|own| own == text), "{text}: {svg}");
    }
    assert_eq!(json(&["inspect", &dir, "--json"])["state"]["step"], 500);
    fs::write(Path::new(&dir).join("1.200.safetensors"), "cut").unwrap();
    let plot = temp.path().join("damaged.svg");
    let output = posthoc_ema(&["inspect", &dir, "--plot", plot.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let svg = fs::read_to_string(plot).unwrap();
    let marks = |svg: &str| svg.matches("stroke=\"#005AA0\"").count();
    assert!(svg.contains("9 × ") && svg.contains("1 damaged") && marks(&svg) == 19, "{svg}");
}

#[test]
fn output_is_printed_before_a_picture_fails() {
    let (_temp, dir) = run();
    for arguments in [vec!["error", &dir], vec!["plan", &dir, "--sigma-rel", "0.1"], vec!["inspect", &dir]] {
        let output = posthoc_ema(&[&arguments[..], &["--json", "--plot", "/nonexistent/a.png"]].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && why.contains("/nonexistent/a.png"), "{why}");
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }
}

#[test]
fn unknown_picture_formats_are_bad_usage() {
    let (_temp, dir) = run();
    let many: String = (5..=13).map(|i| format!("0.{i:02}")).collect::<Vec<_>>().join(",");
    for (arguments, part) in [
        (vec!["error", &dir, "--plot", "a.pdf"], ".svg or .png"),
        (vec!["plan", &dir, "--sigma-rel", "0.1", "--plot", "a"], ".svg or .png"),
        (vec!["inspect", &dir, "--plot", "a.jpg"], ".svg or .png"),
        (vec!["bench", "--plot", "a.svg.gz"], ".svg or .png"),
        (vec!["plan", &dir, "--sigma-rel", &many, "--plot", "a.svg"], "at most 8 targets, not 9"),
    ] {
        let (status, text) = failure(&arguments);
        assert!(status == 2 && text.contains(part), "{arguments:?}: {status} {text}");
        assert!(!PathBuf::from("a.svg").exists());
    }
}

#[test]
fn bench_picture_is_drawn_as_png() {
    let small =
        ["bench", "--device", "cpu", "--parameters", "10000", "--tensors", "30", "--snapshots", "3", "--repeats=2"];
    assert!(draw(&small).contains("f32, compensated, 30 tensors"));
}

#[test]
fn picture_removes_what_a_killed_process_left() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("a.svg");
    let file = posthoc_ema::fs::AtomicFile::create(&path).unwrap();
    let name = names(temp.path()).remove(0);
    drop(file);
    // As after a kill: the file exists, but no process holds its lock.
    fs::write(temp.path().join(format!("{}abcdef", &name[..name.len() - 6])), "").unwrap();
    stdout(&["plan", "--steps=1000", "--sigma-rel=0.1", "--plot", path.to_str().unwrap()]);
    assert_eq!(names(temp.path()), ["a.svg"]);
}
