//! `--part K/N`: several processes write the bytes of one, in any order, at the same time, and between kills.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use posthoc_ema::{Dtype, PostHocEma};
use rand::Rng;
use safetensors::tensor::TensorView;

use crate::common::{failure, json, names, posthoc_ema};
use crate::kill::{kill, kills, random};

/// Tensors of the model: sizes that no page divides.
const TENSORS: [(&str, usize); 5] =
    [("a.weight", 9001), ("b.weight", 333), ("c.weight", 20_011), ("d.bias", 7), ("e.weight", 5003)];

/// Returns the values after a step.
fn model(step: usize) -> Vec<(&'static str, Vec<f32>)> {
    let value = |i: usize| ((step * 7 + i * 13) as f32).sin() * 0.1 + 1.0;
    TENSORS.iter().map(|&(name, count)| (name, (0..count).map(value).collect())).collect()
}

fn train(dir: &Path, steps: usize) {
    let options = PostHocEma::options(dir).update_every(1).update_after_step(0).checkpoint_every(5);
    let mut ema = options.resume_or_create(&model(0)).unwrap();
    for step in ema.step() as usize + 1..=steps {
        ema.update(&model(step)).unwrap();
    }
    ema.finish().unwrap();
}

/// Writes checkpoints of the model with copied tensors of two dtypes.
fn write_checkpoints(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for step in [5, 10, 15, 20] {
        let floats = model(step);
        let bytes: Vec<Vec<u8>> =
            floats.iter().map(|(_, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
        let counts: Vec<u8> = (0..3000i64).flat_map(|i| (i * step as i64).to_le_bytes()).collect();
        let mask: Vec<u8> = (0..10_001).map(|i| (i % 3) as u8).collect();
        let view = |dtype, count, bytes| TensorView::new(dtype, vec![count], bytes).unwrap();
        let mut tensors: Vec<(&str, TensorView<'_>)> =
            floats.iter().zip(&bytes).map(|((name, v), bytes)| (*name, view(Dtype::F32, v.len(), bytes))).collect();
        tensors.push(("counts", view(Dtype::I64, 3000, &counts)));
        tensors.push(("mask", view(Dtype::U8, 10_001, &mask)));
        safetensors::serialize_to_file(tensors, None, &dir.join(format!("step{step}.safetensors"))).unwrap();
    }
}

/// Writes the folder of a model with two shards, a configuration and a tokenizer.
fn write_model_folder(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let zeros = vec![0; 2 * 20_011];
    let mut map = BTreeMap::new();
    for (i, tensors) in [&TENSORS[..2], &TENSORS[2..]].iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", i + 1);
        let view = |count: usize| TensorView::new(Dtype::BF16, vec![count], &zeros[..2 * count]).unwrap();
        let views: Vec<(&str, TensorView<'_>)> = tensors.iter().map(|&(name, count)| (name, view(count))).collect();
        safetensors::serialize_to_file(views, None, &dir.join(&name)).unwrap();
        map.extend(tensors.iter().map(|&(tensor, _)| (tensor, name.clone())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(dir.join("config.json"), r#"{"torch_dtype": "bfloat16"}"#).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
}

/// A run, checkpoints and the folder of a model.
struct Sources {
    temp: tempfile::TempDir,
    run: String,
    checkpoints: String,
    like: String,
}

impl Sources {
    fn new() -> Sources {
        let temp = tempfile::tempdir().unwrap();
        let [run, checkpoints, like] = ["run", "checkpoints", "like"].map(|name| temp.path().join(name));
        train(&run, 20);
        write_checkpoints(&checkpoints);
        write_model_folder(&like);
        let [run, checkpoints, like] = [run, checkpoints, like].map(|path| path.to_str().unwrap().to_owned());
        Sources { temp, run, checkpoints, like }
    }

    /// Returns commands without their output, with the option that names it: all forms of averages.
    fn commands(&self) -> Vec<(Vec<String>, &'static str)> {
        let Sources { run, checkpoints, like, .. } = self;
        let command = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let two = "--sigma-rel=0.1,0.2";
        vec![
            (command(&["synthesize", run, "--sigma-rel=0.15"]), "-o"),
            (command(&["synthesize", run, two, "--dtype=bf16"]), "--out-dir"),
            (command(&["synthesize", run, "--sigma-rel=0.15", "--shard-size=20KB", "--dtype=f64"]), "-o"),
            (command(&["synthesize", run, two, "--like", like]), "--out-dir"),
            (command(&["average", checkpoints, "--uniform=15"]), "-o"),
            (command(&["average", checkpoints, "--uniform=15,20", "--shard-size=50KB", "--dtype=f16"]), "--out-dir"),
        ]
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }
}

/// Returns the arguments of a command with its output, and those of a part if there is one.
fn with_output(command: &(Vec<String>, &str), output: &Path, part: Option<(usize, usize)>) -> Vec<String> {
    let mut arguments = command.0.clone();
    arguments.extend([command.1.to_owned(), output.to_str().unwrap().to_owned()]);
    arguments.extend(part.map(|(number, count)| format!("--part={number}/{count}")));
    arguments
}

fn call(arguments: &[String]) -> String {
    let output = posthoc_ema(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

fn start(arguments: &[String]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Returns the bytes of a file or of all files of a folder, hidden ones included, by their paths.
fn contents(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    if path.is_file() {
        return BTreeMap::from([(PathBuf::new(), fs::read(path).unwrap())]);
    }
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap()) {
        all.extend(contents(&entry.path()).into_iter().map(|(rest, b)| (Path::new(&entry.file_name()).join(rest), b)));
    }
    all
}

/// Returns the names in a directory that are not hidden.
fn visible(dir: &Path) -> Vec<String> {
    if dir.exists() { names(dir).into_iter().filter(|name| !name.starts_with('.')).collect() } else { Vec::new() }
}

/// Checks that nothing but the outputs is left.
fn assert_equal(found: &Path, expected: &Path, what: &str) {
    let [found_all, expected_all] = [found, expected].map(contents);
    let paths = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(&found_all), paths(&expected_all), "{what}");
    assert!(!expected_all.is_empty() && found_all == expected_all, "{what}: other bytes");
    let beside = names(found.parent().unwrap());
    assert!(beside.iter().all(|name| !name.starts_with('.')), "{what}: {beside:?}");
}

#[test]
fn parts_write_the_bytes_of_one_process() {
    let sources = Sources::new();
    for (i, command) in sources.commands().iter().enumerate() {
        let whole = sources.path(&format!("whole{i}"));
        call(&with_output(command, &whole, None));
        for count in [1, 2, 3, 7] {
            let out = sources.path(&format!("place{i}-{count}/out"));
            let place = if command.1 == "-o" { out.parent().unwrap() } else { &out };
            let mut order: Vec<usize> = (1..=count).collect();
            order.rotate_left(count / 2);
            for (done, &number) in order.iter().enumerate() {
                assert_eq!(visible(place), Vec::<String>::new(), "{command:?}, {done} of {count}");
                let text = call(&with_output(command, &out, Some((number, count))));
                let last = text.trim_end().lines().last().unwrap().to_owned();
                assert!(last.starts_with(&format!("part {number}/{count} is written; ")), "{last}");
                assert_eq!(last.ends_with(&format!("all {count} parts are written: complete")), done + 1 == count);
                match count - done - 1 {
                    0 => {}
                    1 => assert!(last.contains(&format!("; part {} is missing", order[done + 1])), "{last}"),
                    missing => assert!(last.contains(&format!("; {missing} parts are missing")), "{last}"),
                }
            }
            assert_equal(&out, &whole, &format!("{command:?} in {count} parts"));
        }
    }
}

#[test]
fn concurrent_parts_and_duplicates_write_the_bytes_of_one_process() {
    let sources = Sources::new();
    for (i, command) in sources.commands().iter().enumerate() {
        let whole = sources.path(&format!("whole{i}"));
        call(&with_output(command, &whole, None));
        let out = sources.path(&format!("place{i}/out"));
        let parts: Vec<Child> =
            [1, 2, 3, 1, 2, 3].map(|number| start(&with_output(command, &out, Some((number, 3))))).into();
        for part in parts {
            let ended = part.wait_with_output().unwrap();
            assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
        }
        assert_equal(&out, &whole, &format!("{command:?} at the same time"));
    }
}

/// Each part is killed at random moments until it succeeds, two of them at a time.
#[test]
fn killed_parts_write_the_bytes_of_one_process() {
    let sources = Sources::new();
    let mut random = random();
    let commands = sources.commands();
    let (mut killed, mut round) = (0, 0);
    while killed < kills(20) {
        let command = &commands[round % commands.len()];
        let whole = sources.path(&format!("whole{}", round % commands.len()));
        let begun = Instant::now();
        if !whole.exists() {
            call(&with_output(command, &whole, None));
        }
        let long = begun.elapsed().clamp(Duration::from_millis(30), Duration::from_millis(400));
        let out = sources.path(&format!("place{round}/out"));
        let mut pending = vec![1, 2, 3];
        while !pending.is_empty() {
            let first = pending[random.random_range(0..pending.len())];
            let second = random.random_range(1..=3);
            let other = start(&with_output(command, &out, Some((second, 3))));
            let child = start(&with_output(command, &out, Some((first, 3))));
            for (number, child) in [(first, child), (second, other)] {
                match kill(child, random.random_range(Duration::ZERO..long)) {
                    true => pending.retain(|&other| other != number),
                    false => killed += 1,
                }
            }
            // Names appear with all bytes or not at all.
            let place = if command.1 == "-o" { out.parent().unwrap() } else { &out };
            for name in visible(place) {
                let expected = if command.1 == "-o" { whole.clone() } else { whole.join(&name) };
                assert!(contents(&place.join(&name)) == contents(&expected), "{command:?}: {name}");
            }
        }
        // The last one may have been killed after its mark, or while it removed the hidden folder.
        call(&with_output(command, &out, Some((2, 3))));
        assert_equal(&out, &whole, &format!("{command:?} after kills"));
        round += 1;
    }
    println!("{killed} kills, {round} averages");
}

#[test]
fn parts_that_disagree_are_refused() {
    let sources = Sources::new();
    let Sources { run, like, .. } = &sources;
    let out = sources.path("out/average.safetensors");
    let out = out.to_str().unwrap();
    let first = ["synthesize", run, "--sigma-rel=0.15", "-o", out];
    call(&[&first[..], &["--part=2/3"]].concat().iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
    let refused = |arguments: &[&str], expected: &[&str]| {
        let (status, text) = failure(arguments);
        let named = [".average.safetensors.parts", "remove this folder", "parts of one average differ in"];
        assert!(status == 1 && named.iter().chain(expected).all(|part| text.contains(part)), "{text}");
    };
    let part = "--part=1/3";
    refused(&["synthesize", run, "--sigma-rel=0.2", "-o", out, part], &["sigma_rel 0.15 at", "sigma_rel 0.2 at"]);
    refused(&[&first[..], &["--dtype=bf16", part]].concat(), &["the dtype", "the model's", "has BF16"]);
    refused(&[&first[..], &["--part=1/4"]].concat(), &["their number", "K/3", "K/4"]);
    refused(&[&first[..], &["--at=15", part]].concat(), &["at step 20", "at step 15", "--at"]);
    refused(&[&first[..], &["--noise=0.1", part]].concat(), &["the weights of their sources"]);
    refused(&[&first[..], &["--rename=s/a/z/", part]].concat(), &["their files"]);
    refused(&[&first[..], &["--like", like, part]].concat(), &["their files", "model-00001"]);
    // The training goes on.
    train(Path::new(run), 25);
    refused(&[&first[..], &[part]].concat(), &["at step 20", "at step 25"]);
    let at: Vec<String> = [&first[..], &["--at=20"]].concat().iter().map(|&word| word.to_owned()).collect();
    for part in ["--part=1/3", "--part=3/3"] {
        call(&[&at[..], &[part.to_owned()]].concat());
    }
    let whole = sources.path("whole");
    let command = (at[..3].iter().cloned().chain(["--at=20".to_owned()]).collect(), "-o");
    call(&with_output(&command, &whole, None));
    assert_equal(Path::new(out), &whole, "after refusals");
}

#[test]
fn finished_and_unusable_outputs() {
    let sources = Sources::new();
    let out = sources.path("out");
    let text = out.to_str().unwrap().to_owned();
    let part_of = |output: &str, number: usize| {
        let command = ["synthesize", &sources.run, "--sigma-rel=0.15", "--shard-size=20KB", "-o", output, "--json"];
        json(&[&command[..], &[&format!("--part={number}/2")]].concat())["part"].clone()
    };
    let part = |number: usize| part_of(&text, number);
    let report = |number, before: bool, missing: &[usize]| {
        serde_json::json!({ "number": number, "count": 2, "written_before": before, "missing": missing,
                            "complete": missing.is_empty() })
    };
    assert_eq!(part(2), report(2, false, &[1]));
    assert_eq!(part(2), report(2, true, &[1]));
    assert_eq!(part(1), report(1, false, &[]));
    let before = contents(&out);
    // A part of a finished average changes nothing.
    assert_eq!([part(1), part(2)], [report(1, true, &[]), report(2, true, &[])]);
    assert!(contents(&out) == before && names(sources.temp.path()).iter().all(|name| !name.starts_with('.')));
    // So does one that finds a folder which was created while others finished the average.
    assert_eq!(part_of(sources.path("other").to_str().unwrap(), 1), report(1, false, &[2]));
    let [unfinished, stale] = [".other.parts", ".out.parts"].map(|name| sources.path(name));
    fs::rename(unfinished, stale).unwrap();
    assert_eq!([part(2), part(1)], [report(2, true, &[]), report(1, true, &[])]);
    assert!(contents(&out) == before && !sources.path(".out.parts").exists());
    // Another average is not replaced if it is a folder, and is if it is a file.
    let other = ["synthesize", &sources.run, "--sigma-rel=0.2", "--shard-size=20KB", "-o", &text, "--part=1/2"];
    let (status, error) = failure(&other);
    assert!(status == 1 && error.contains("not empty") && contents(&out) == before, "{error}");
    let file = sources.path("file.safetensors");
    fs::write(&file, "before").unwrap();
    let command = (vec!["synthesize".to_owned(), sources.run.clone(), "--sigma-rel=0.15".to_owned()], "-o");
    call(&with_output(&command, &file, Some((1, 2))));
    assert_eq!(fs::read(&file).unwrap(), b"before");
    call(&with_output(&command, &file, Some((2, 2))));
    let whole = sources.path("whole");
    call(&with_output(&command, &whole, None));
    assert_equal(&file, &whole, "a file that was replaced");
    let base = ["synthesize", &sources.run, "--sigma-rel=0.15"];
    for (rest, status, expected) in [
        (&["-o", "-", "--part=1/2"][..], 1, "name a file"),
        (&["-o", "x", "--part=0/4"], 2, "counted from 1"),
        (&["-o", "x", "--part=5/4"], 2, "K is at most N"),
        (&["-o", "x", "--part=x"], 2, "write K/N"),
    ] {
        let (found, text) = failure(&[&base[..], rest].concat());
        assert!(found == status && text.contains(expected) && text.contains("part"), "{rest:?}: {text}");
    }
}
