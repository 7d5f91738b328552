//! Commands on a sharded run, beside the same run of one process.

use std::fs;
use std::path::Path;

use posthoc_ema::{Dtype, Options, Parameters, PostHocEma, Result, TensorView};

use crate::common::{json, names, posthoc_ema, stdout};

/// Names, shapes and extents of the rows of each process. The last one holds no row of the first tensor.
const TENSORS: [(&str, [usize; 2], [usize; 3]); 2] =
    [("layer.weight", [25, 41], [13, 12, 0]), ("layer.bias", [7, 3], [3, 3, 1])];

/// Rows of a model that one process holds.
struct Rows {
    offsets: [[usize; 2]; 2],
    shapes: [[usize; 2]; 2],
    values: [Vec<f32>; 2],
    is_sharded: bool,
}

impl Rows {
    /// Returns the rows of a process, or all rows without one.
    fn new(rank: Option<usize>, step: usize) -> Rows {
        let mut rows =
            Rows { offsets: [[0; 2]; 2], shapes: [[0; 2]; 2], values: Default::default(), is_sharded: rank.is_some() };
        for (i, (_, [_, columns], extents)) in TENSORS.iter().enumerate() {
            let before = rank.map_or(0, |rank| extents[..rank].iter().sum());
            let extent = rank.map_or(extents.iter().sum(), |rank| extents[rank]);
            rows.offsets[i][0] = before;
            rows.shapes[i] = [extent, *columns];
            let elements = before * columns..(before + extent) * columns;
            rows.values[i] = elements.map(|element| ((step * 7 + element * 13) as f32).sin()).collect();
        }
        rows
    }
}

impl Parameters for Rows {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let mut views = Vec::new();
        for (i, (name, global, _)) in TENSORS.iter().enumerate() {
            let view = TensorView::host(name, Dtype::F32, &self.shapes[i], bytemuck::cast_slice(&self.values[i]))?;
            views.push(if self.is_sharded { view.as_part_of(global, &self.offsets[i])? } else { view });
        }
        read(&views)
    }
}

/// Trains a run with three processes, or with one without parts.
fn train(dir: &Path, is_sharded: bool) {
    let options: Options = PostHocEma::options(dir).checkpoint_every(50).update_every(10).checkpoint_dtype(Dtype::F16);
    let ranks: Vec<Option<usize>> = if is_sharded { (0..3).map(Some).collect() } else { vec![None] };
    let open = |&rank: &Option<usize>| {
        let options = options.clone().snapshot_growth(None);
        let options = if rank.is_some() { options.shard(rank, 3, "id") } else { options };
        options.create(&Rows::new(rank, 0)).unwrap()
    };
    let mut trackers: Vec<PostHocEma> = ranks.iter().map(open).collect();
    for step in 0..500 {
        for (rank, tracker) in ranks.iter().zip(&mut trackers) {
            tracker.update(&Rows::new(*rank, step)).unwrap();
        }
    }
    trackers.iter_mut().for_each(|tracker| tracker.finish().unwrap());
}

/// Returns the bytes of all files in a folder, by name.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn commands_read_a_sharded_run_as_any_other() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    train(&path("whole"), false);
    train(&path("sharded"), true);
    fs::write(path("eval.sh"), "echo score 1\n").unwrap();
    assert!(names(&path("sharded")).contains(&"1.500-part-00003-of-00003.safetensors".to_owned()));
    for out in ["of-whole", "of-sharded"] {
        let run = text(out.strip_prefix("of-").unwrap());
        fs::create_dir(path(out)).unwrap();
        stdout(&["synthesize", &run, "--sigma-rel", "0.1,0.2", "--verify", "--out-dir", &text(out)]);
        let eval = format!("sh {} {{}}", text("eval.sh"));
        let sweep = format!("sweep-{out}");
        stdout(&["sweep", &run, "--eval", &eval, "--sigma-rel", "0.1,0.15", "--out-dir", &text(&sweep)]);
    }
    assert!(names(&path("of-whole")).len() >= 2);
    assert!(contents(&path("of-whole")) == contents(&path("of-sharded")));
    let of = |run: &str, arguments: &[&str]| json(&[&[arguments[0], &text(run)], &arguments[1..]].concat());
    for arguments in [&["plan", "--sigma-rel", "0.15", "--json"][..], &["verify", "--json"]] {
        let (whole, sharded) = (of("whole", arguments), of("sharded", arguments));
        if arguments[0] == "plan" {
            assert_eq!(sharded["weights"], whole["weights"]);
            assert_eq!(sharded["predicted"], whole["predicted"]);
        }
    }
    let inspected = of("sharded", &["inspect", "--json"]);
    let newest = &inspected["snapshots"].as_array().unwrap()[0];
    assert_eq!((newest["files"].as_array().unwrap().len(), newest["parameters"].as_u64()), (3, Some(25 * 41 + 21)));
}

#[test]
fn damaged_and_missing_files_of_a_set_are_named_and_left_out() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir, true);
    let run = dir.to_str().unwrap();
    let out = temp.path().join("average.safetensors");
    let synthesize = ["synthesize", run, "--sigma-rel", "0.15", "-o", out.to_str().unwrap()];
    for index in 0..2 {
        fs::remove_file(dir.join(format!("{index}.500-part-00002-of-00003.safetensors"))).unwrap();
    }
    let output = posthoc_ema(&synthesize);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let expected = "snapshot 0.500 is left out: 2 of its 3 files are there, and 0.500-part-00002-of-00003.safetensors";
    assert!(output.status.success() && stderr.contains(expected), "{stderr}");
    let plan = posthoc_ema(&["plan", run, "--sigma-rel", "0.15", "--json"]);
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(plan["targets"][0]["at"], 450, "{plan}");
    let damaged = dir.join("0.300-part-00001-of-00003.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    fs::remove_file(&out).unwrap();
    let output = posthoc_ema(&[&synthesize[..], &["--skip-damaged"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("0.300-part-00001-of-00003.safetensors"), "{stderr}");
    let output = posthoc_ema(&["verify", run]);
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("0.300-part-00001-of-00003.safetensors"), "{text}");
}
