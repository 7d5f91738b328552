//! Configurations of the checkpoints: which differences are refused.

use serde_json::{Value, json};

use super::*;

/// Opens two checkpoints with these configurations.
fn open(name: &str, configs: [Value; 2], ignored: &[&str]) -> std::result::Result<(), String> {
    open_texts(name, configs.map(|config| config.to_string()), ignored)
}

/// Opens two checkpoints with configurations of this text.
fn open_texts(name: &str, configs: [String; 2], ignored: &[&str]) -> std::result::Result<(), String> {
    let temp = tempfile::tempdir().unwrap();
    for (step, config) in (1..).zip(configs) {
        let dir = temp.path().join(format!("checkpoint-{step}"));
        fs::create_dir_all(dir.join("2_Dense")).unwrap();
        save(&dir.join("model.safetensors"), &[("x.lora_A", Tensor::new(&[1], &[1f32]).unwrap())], &[]);
        fs::write(dir.join("modules.json"), r#"[{"path": "2_Dense"}]"#).unwrap();
        fs::write(dir.join(name), config).unwrap();
    }
    let ignore_config = ignored.iter().map(|key| key.to_string()).collect();
    let options = CheckpointOptions { ignore_config, ..Default::default() };
    Checkpoints::open_with(&[temp.path()], &options).map(drop).map_err(|error| error.to_string())
}

#[test]
fn models_of_different_configuration_are_refused() {
    for (configs, part) in [
        ([json!({"rope_theta": 1e4}), json!({"rope_theta": 500_000.0})], "`rope_theta` is 500000.0, but 10000.0 in"),
        ([json!({"hidden_act": "gelu"}), json!({"hidden_act": "relu"})], r#"`hidden_act` is "relu", but "gelu" in"#),
        (
            [json!({"text_config": {"rms_norm_eps": 1e-5}}), json!({"text_config": {"rms_norm_eps": 1e-6}})],
            "`text_config.rms_norm_eps` is 1e-6, but 0.00001 in",
        ),
        ([json!({"id2label": {"0": "cat"}}), json!({"id2label": {"0": "dog"}})], r#"`id2label.0` is "dog", but "cat""#),
        ([json!({}), json!({"scale_embedding": true})], "`scale_embedding` is true, but null in"),
    ] {
        let text = open("config.json", configs.clone(), &[]).unwrap_err();
        assert!(text.contains(part) && text.contains("checkpoint-2/config.json"), "{text}");
        let key = part.split('`').nth(1).unwrap();
        assert!(text.contains(&format!("allow it with --ignore-config {key} (`ignore_config`)")), "{text}");
        assert!(open("2_Dense/config.json", configs.clone(), &[]).unwrap_err().contains(part));
        assert_eq!(open("config.json", configs.clone(), &[key]), Ok(()));
        assert_eq!(open("config.json", configs, &["*"]), Ok(()));
    }
}

#[test]
fn harmless_differences_of_configurations_are_allowed() {
    let config = json!({
        "transformers_version": "4.40.0", "torch_dtype": "float32", "_name_or_path": "a", "use_cache": true,
        "attention_dropout": 0.1, "pad_token_id": null, "layers": 2, "tied": false, "text": {"dtype": "float32"},
    });
    let other = json!({
        "transformers_version": "5.0.0", "dtype": "bfloat16", "_name_or_path": "b", "use_cache": false,
        "attention_dropout": 0.0, "pad_token_id": 3, "layers": 2.0, "text": {"dtype": "float16"}, "new_in_5": 1,
    });
    assert_eq!(open("config.json", [config.clone(), other.clone()], &[]), Ok(()));
    let mut same_version = other;
    same_version["transformers_version"] = "4.40.0".into();
    let text = open("config.json", [config, same_version], &[]).unwrap_err();
    assert!(text.contains("`new_in_5` is 1, but null in"), "{text}");
}

#[test]
fn adapters_of_another_kind_or_scale_are_refused() {
    let base = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q", "v"], "revision": null});
    let changed = |key: &str, value: Value| {
        let mut config = base.clone();
        config[key] = value;
        open("adapter_config.json", [base.clone(), config], &["*"])
    };
    let same = changed("target_modules", json!(["v", "q"]));
    assert_eq!((same, changed("peft_version", json!("0.21"))), (Ok(()), Ok(())));
    for (key, value, part) in [
        ("lora_alpha", json!(16), "`lora_alpha` is 16, but 8 in"),
        ("use_rslora", json!(true), "`use_rslora` is true, but null in"),
        ("alpha", json!(4), "`alpha` is 4, but null in"),
        ("rank_pattern", json!({"q": 4}), r#"`rank_pattern` is {"q":4}, but null in"#),
        ("peft_type", json!("LOHA"), r#"`peft_type` is "LOHA", but "LORA" in"#),
    ] {
        let text = changed(key, value).unwrap_err();
        assert!(text.contains(part) && text.contains("checkpoint-2/adapter_config.json"), "{text}");
    }
}

#[test]
fn configurations_of_other_libraries_are_compared() {
    let two = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
    for (name, configs, part) in [
        (
            "params.json",
            two(r#"{"dim": 8, "norm_eps": 1e-5}"#, r#"{"dim": 8, "norm_eps": 1e-6}"#),
            "`norm_eps` is 1e-6",
        ),
        ("model_config.yaml", two("rope_base: 10000\n", "rope_base: 500000\n"), "`rope_base` is 500000.0, but 10000.0"),
        ("hparams.yaml", two("model:\n  n_heads: 4\nlr: 1\n", "model:\n  n_heads: 8\n"), "`model.n_heads` is 8.0"),
        ("args.yaml", two("task: detect\n", "task: segment\n"), r#"`task` is "segment", but "detect" in"#),
    ] {
        let text = open_texts(name, configs.clone(), &[]).unwrap_err();
        assert!(text.contains(part) && text.contains(&format!("checkpoint-2/{name}")), "{text}");
        assert_eq!(open_texts(name, configs, &["*norm_eps", "rope_base", "*n_heads", "task"]), Ok(()));
    }
    // Settings of a training, paths and dates.
    let training = |lr: &str, path: &str| format!("lr: {lr}\nhead_lr: {lr}\nsave_dir: {path}\nepochs: 1{lr}\n");
    for name in ["hparams.yaml", "args.yaml"] {
        assert_eq!(open_texts(name, [training("1", "/a/head"), training("2", "/b/head")], &[]), Ok(()));
    }
    assert_eq!(open_texts("model_config.yaml", two("hf_config:\n  name: a\n", "hf_config:\n  name: b\n"), &[]), Ok(()));
    assert_eq!(open_texts("params.json", two(r#"{"max_batch_size": 1}"#, r#"{"max_batch_size": 8}"#), &[]), Ok(()));
}

/// Lightning writes them in the folder above that of the checkpoints.
#[test]
fn settings_above_the_folder_of_a_file_are_compared() {
    let temp = tempfile::tempdir().unwrap();
    let paths = [(1, "relu"), (2, "gelu")].map(|(step, activation)| {
        let dir = temp.path().join(format!("version_{step}"));
        fs::create_dir_all(dir.join("checkpoints")).unwrap();
        fs::write(dir.join("hparams.yaml"), format!("activation: {activation}\n")).unwrap();
        let path = dir.join(format!("checkpoints/step={step}.safetensors"));
        save(&path, &[("x", Tensor::new(&[1], &[1f32]).unwrap())], &[]);
        path
    });
    let text = Checkpoints::open(&paths, None).unwrap_err().to_string();
    assert!(text.contains(r#"version_2/hparams.yaml: `activation` is "gelu", but "relu" in"#), "{text}");
}
