//! Sweeps whose averages are folders that a model's library loads.

use super::*;

const FEW: [&str; 2] = ["--sigma-rel", "0.1,0.14,0.2"];

/// Writes a model's folder beside the run.
fn like(case: &Case) -> String {
    let dir = case.temp.path().join("like");
    fs::create_dir(&dir).unwrap();
    let zeros = vec![0; 12];
    let view = safetensors::tensor::TensorView::new(posthoc_ema::Dtype::F32, vec![3], &zeros).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors::serialize([("weight", view)], None).unwrap()).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("optimizer.pt"), "").unwrap();
    dir.to_str().unwrap().to_owned()
}

fn sweep(case: &Case, further: &[&str]) -> std::process::Output {
    let eval = format!("test -f {{}}/config.json && sh {} {{}}/model.safetensors", case.script.display());
    let fixed = ["sweep", &case.run, "--eval", &eval, "--out-dir", case.out.to_str().unwrap(), "--json"];
    posthoc_ema(&[&fixed[..], further].concat())
}

#[test]
fn evaluation_gets_a_ready_folder_and_the_best_is_one() {
    for further in [&[][..], &["--keep-all"]] {
        let case = Case::new();
        case.script("");
        let like = like(&case);
        let given = [&FEW[..], &["--like", &like, "--refine", "1", "--batch", "2"], further].concat();
        let output = sweep(&case, &given);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success() && document["failed"] == 0, "{document}");
        let best = case.out.join("best");
        assert_eq!(document["path"], best.to_str().unwrap());
        assert_eq!(names(&best), ["config.json", "model.safetensors"]);
        let profile = serde_json::from_value(document["best"]["profile"].clone()).unwrap();
        assert_eq!(weight(&best.join("model.safetensors")), case.average(&profile));
        let kept = if further.is_empty() { vec![] } else { names(&case.out.join("candidates")) };
        assert_eq!(kept.len(), if further.is_empty() { 0 } else { document["trials"].as_array().unwrap().len() });
        assert!(kept.iter().all(|name| !name.ends_with(".safetensors")), "{kept:?}");
        // The same command evaluates nothing again, and writes a best average that is gone.
        fs::remove_dir_all(&best).unwrap();
        let output = sweep(&case, &given);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let again: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&again["evaluated"], &again["trials"]), (&0.into(), &document["trials"]));
        assert_eq!(names(&best), ["config.json", "model.safetensors"]);
        assert_eq!(case.names().iter().filter(|name| name.starts_with("best")).count(), 1);
    }
}

#[test]
fn each_metric_has_a_folder_of_its_own() {
    let case = Case::new();
    case.script("");
    fs::write(&case.script, fs::read_to_string(&case.script).unwrap().replace("\"score\", d", "\"a:\", d")).unwrap();
    let both = fs::read_to_string(&case.script).unwrap().replace("}'", "; print \"b:\", x }'");
    fs::write(&case.script, both).unwrap();
    let like = like(&case);
    let output =
        sweep(&case, &[&FEW[..], &["--like", &like, "--metric", "a", "--metric", "b", "--refine", "1"]].concat());
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (metric, name) in ["best", "best-b"].into_iter().enumerate() {
        let profile = serde_json::from_value(document["metrics"][metric]["best"]["profile"].clone()).unwrap();
        assert_eq!(weight(&case.out.join(name).join("model.safetensors")), case.average(&profile), "{name}");
    }
}

#[test]
fn folders_of_others_and_other_forms_are_left_alone() {
    let case = Case::new();
    case.script("");
    let like = like(&case);
    fs::create_dir_all(case.out.join("best")).unwrap();
    fs::write(case.out.join("best/mine"), "").unwrap();
    let text = |further: &[&str]| String::from_utf8(sweep(&case, further).stderr).unwrap();
    let one = ["--sigma-rel", "0.1", "--refine", "0"];
    let refused = text(&[&one[..], &["--like", &like]].concat());
    assert!(refused.contains("a sweep would replace best"), "{refused}");
    fs::write(case.out.join("sweep.json"), "{").unwrap();
    let refused = text(&[&one[..], &["--like", &like]].concat());
    assert!(refused.contains("not the folder of an average") && case.out.join("best/mine").exists(), "{refused}");
    fs::remove_dir_all(&case.out).unwrap();
    assert!(sweep(&case, &[&one[..], &["--like", &like]].concat()).status.success());
    let refused = text(&[&one[..], &["--shard-size", "1GB"]].concat());
    assert!(refused.contains("has another form"), "{refused}");
    let refused = text(&[&one[..], &["--like", &like, "--rename", "s/^/x./"]].concat());
    assert!(
        refused.contains("the average has no `weight`") && refused.contains("the folder has no `x.weight`"),
        "{refused}"
    );
}

/// Averages of both runs are folders, each like its own model's, and the best pair is kept as two.
#[test]
fn averages_of_a_second_run_are_folders_of_their_own() {
    let (case, guide) = (Case::new(), Case::scaled(0.5));
    let (like_first, like_second) = (like(&case), like(&guide));
    fs::write(guide.temp.path().join("like/guide.json"), "{}").unwrap();
    let read = |path: &str| format!("$(od -An -tf4 -j$((8 + $(od -An -tu8 -N8 {path}))) -N4 {path})");
    let eval = format!(
        "test -f {{}}/config.json && test -f {{with}}/guide.json && ! test -e {{}}/guide.json && \
         awk -v \"x={x}\" -v \"y={y}\" 'BEGIN {{ print (x - {first}) ^ 2 + (y - {second}) ^ 2 }}'",
        x = read("$POSTHOC_EMA_WEIGHTS/model.safetensors"),
        y = read("$POSTHOC_EMA_WITH/model.safetensors"),
        first = case.average(&profile(0.1)),
        second = guide.average(&profile(0.2)),
    );
    let out = case.out.to_str().unwrap();
    let fixed = ["sweep", &case.run, "--with", &guide.run, "--eval", &eval, "--out-dir", out, "--json"];
    let forms = ["--like", &like_first, "--with-like", &like_second, "--rounds", "1"];
    let arguments = [&fixed[..], &FEW, &forms].concat();
    let output = posthoc_ema(&arguments);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success() && document["failed"] == 0, "{document}");
    assert_eq!(case.names(), ["best", "best-with", "sweep.json"]);
    assert_eq!(names(&case.out.join("best-with")), ["config.json", "guide.json", "model.safetensors"]);
    let of_second = serde_json::from_value(document["best"]["groups"]["with"].clone()).unwrap();
    assert_eq!(weight(&case.out.join("best-with/model.safetensors")), guide.average(&of_second));
    // A folder that is gone is written again, and one sweep has one form.
    fs::remove_dir_all(case.out.join("best-with")).unwrap();
    assert!(posthoc_ema(&arguments).status.success());
    assert_eq!(weight(&case.out.join("best-with/model.safetensors")), guide.average(&of_second));
    let (status, text) = failure(&[&fixed[..], &FEW, &forms[..2]].concat());
    assert!(status == 1 && text.contains("has another form of the second run"), "{text}");
    // Without a folder of its own, the second average must fit that of the first one.
    let missing = guide.temp.path().join("like/model.safetensors");
    let view = |bytes| safetensors::tensor::TensorView::new(posthoc_ema::Dtype::F32, vec![3], bytes).unwrap();
    fs::write(&missing, safetensors::serialize([("other", view(&[0; 12]))], None).unwrap()).unwrap();
    let (status, text) = failure(&arguments);
    assert!(status == 1 && text.contains("the average has no `other`") && text.contains(&like_second), "{text}");
}
