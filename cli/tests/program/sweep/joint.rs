//! Joint sweeps: groups of tensors and two runs, each with a length of its own.

use super::*;

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

/// Two metrics of an encoder and a decoder, with noise that the repeat seeds, and failures.
#[test]
fn joint_sweep_by_two_metrics_compares_along_each_length() {
    let temp = tempfile::tempdir().unwrap();
    let [dir, out, picture] = ["run", "sweep", "sweep.svg"].map(|name| temp.path().join(name));
    two_parts(&dir);
    let run = Run::open(&dir).unwrap();
    let value = |sigma_rel, name: &str| {
        let tensors = run.load(&run.plan(profile(sigma_rel), At::Latest).unwrap()).unwrap();
        tensors.get(name).unwrap().to_vec::<f32>().unwrap()[0]
    };
    let [decoder, encoder] = [value(0.19, "decoder.a"), value(0.09, "encoder.a")];
    // The second metric is the sum of both parts: the shortest averages have the greatest one.
    let eval = format!(
        "case {{}} in *sigma_rel-0.26.*) exit 3;; esac; \
         set -- {{}} && od -An -v -w4 -tf4 -j$((8 + $(od -An -tu8 -N8 \"$1\"))) \"$1\" | \
         awk -v r=$POSTHOC_EMA_REPEAT 'NR == 1 {{ d = ($1 - {decoder}) / 4; s = $1 }} \
              NR == 8 {{ e = ($1 - {encoder}) / 10; s += $1; srand(1000 * r + int($1 * 100) % 997); n = rand() / 50 }} \
              END {{ print \"dist:\", d * d + e * e + n; print \"sum:\", s }}'"
    );
    let fixed = ["sweep", dir.to_str().unwrap(), "--eval", &eval, "--out-dir", out.to_str().unwrap()];
    let further =
        ["--metric", "dist", "--metric", "sum:max", "--group", "decoder.*", "--repeats", "2", "--rounds", "1"];
    let all = [&fixed[..], &["--sigma-rel", "0.05,0.12,...,0.26", "--refine", "1"], &further].concat();
    let output = posthoc_ema(&[&all[..], &["--json"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    // Failures of all stages are reported, not those of the last one alone.
    assert!(stderr.contains("warning: sigma_rel 0.26, sigma_rel 0.26 for decoder.*: its exit status is 3"), "{stderr}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let trials = document["trials"].as_array().unwrap();
    let failed = trials.iter().filter(|trial| trial["error"].is_string()).count();
    assert!(document["failed"] == failed && failed > 1, "{failed}");
    let lengths = |metric: usize| {
        let best = &document["metrics"][metric]["best"];
        [&best["length"]["sigma_rel"], &best["group_lengths"]["decoder.*"]["sigma_rel"]].map(|v| v.as_f64().unwrap())
    };
    let [near, far] = [lengths(0), lengths(1)];
    assert!((near[0] - 0.09).abs() < 0.04 && (near[1] - 0.19).abs() < 0.04, "{near:?}");
    assert!(far[0] <= 0.05 && far[1] <= 0.05, "{far:?}");
    for (metric, file) in [(0, "best.safetensors"), (1, "best-sum.safetensors")] {
        let kept = load(&out.join(file));
        for (name, sigma_rel) in [("encoder.a", lengths(metric)[0]), ("decoder.a", lengths(metric)[1])] {
            let found = kept.get(name).unwrap().to_vec::<f32>().unwrap()[0];
            assert!((found - value(sigma_rel, name)).abs() <= 1e-4 * found, "{file}: {name}");
        }
    }
    let lines = document["lines"].as_array().unwrap();
    let names: Vec<[&Value; 2]> = lines.iter().map(|line| [&line["metric"], &line["part"]]).collect();
    let (dist, sum, group) = ("dist".into(), "sum".into(), "decoder.*".into());
    assert_eq!(names, [[&dist, &Value::Null], [&dist, &group], [&sum, &Value::Null], [&sum, &group]]);
    assert!(lines.iter().all(|line| line["as_good"].is_array()), "{lines:?}");
    assert!(lines[0]["standard_error"].as_f64().unwrap() > 1e-4, "{lines:?}");
    assert!(document["unbeaten"].as_array().unwrap().len() > 1);
    let output = posthoc_ema(&[&all[..], &["--plot", picture.to_str().unwrap()]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "no other average is as good as these in all metrics",
        "best by dist at step 500: ",
        "best by sum at step 500: ",
        "other tensors: ",
        "decoder.*: ",
        " (standard error ",
        "more turns (--rounds) may do better",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let picture = fs::read_to_string(picture).unwrap();
    for label in ["sigma_rel of other tensors", "sigma_rel of decoder.*", "dist", "sum"] {
        assert!(picture.contains(label), "{label}");
    }
    assert_eq!(picture.matches("sigma_rel of decoder.*").count(), 2, "a panel for each length and metric");
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
    // The best of a metric with the name of the second run would have the name of its average.
    let metrics = [&arguments[..], &["--metric", "a", "--metric", "with"]].concat();
    let (status, text) = failure(&metrics);
    assert!(status == 1 && text.contains("best-with.safetensors would be the best average of two"), "{text}");
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
