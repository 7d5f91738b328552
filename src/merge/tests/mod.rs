//! Averages of checkpoints, compared with sums in f64, in every layout of files.

mod configs;
mod files;
mod left_out;
mod like;
mod links;
mod parts;
mod products;
mod refused;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;
use crate::math::{Shape, Window};
use crate::tensor::{Dtype, Tensor, is_averaged};

/// Tensors of a model, with their names.
type Weights = Vec<(&'static str, Tensor)>;

/// Returns a model with tensors of all dtypes. All elements differ, and change from step to step.
fn model(step: u64) -> Weights {
    let value = |tensor: usize, i: usize| ((step as f64 * 0.37 + i as f64).sin() + tensor as f64) * 0.1;
    let values = |tensor: usize, n: usize| (0..n).map(move |i| value(tensor, i));
    let f32s = |tensor, shape: &[usize]| {
        let values: Vec<f32> = values(tensor, shape.iter().product()).map(|x| x as f32).collect();
        Tensor::new(shape, &values).unwrap()
    };
    let f16s: Vec<f16> = values(1, 70).map(f16::from_f64).collect();
    let bf16s: Vec<bf16> = values(2, 33).map(bf16::from_f64).collect();
    let f64s: Vec<f64> = values(3, 4).collect();
    vec![
        ("a.weight", f32s(0, &[3, 5])),
        ("b.half", Tensor::new(&[70], &f16s).unwrap()),
        ("c.brain", Tensor::new(&[11, 3], &bf16s).unwrap()),
        ("d.double", Tensor::new(&[4], &f64s).unwrap()),
        ("e.empty", f32s(4, &[0, 2])),
        ("f.scalar", f32s(5, &[])),
        ("g.count", Tensor::new(&[], &[step as i64]).unwrap()),
        ("h.mask", Tensor { dtype: Dtype::BOOL, shape: vec![2], bytes: vec![1, (step % 2) as u8] }),
    ]
}

/// Writes a safetensors file with the reference implementation.
fn save(path: &Path, tensors: &[(&str, Tensor)], metadata: &[(&str, &str)]) {
    let views = tensors.iter().map(|(name, tensor)| {
        (name.to_string(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

/// Reads the tensors and metadata of a file.
fn read(path: &Path) -> (Tensors, HashMap<String, String>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| {
        (name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    (file.tensors().into_iter().map(tensor).collect(), header.metadata().clone().unwrap_or_default())
}

const STEPS: [u64; 5] = [40, 100, 120, 300, 340];

/// Writes checkpoints in single files, with their steps in the names.
fn series() -> (TempDir, Vec<PathBuf>) {
    let temp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = STEPS.iter().map(|step| temp.path().join(format!("step_{step}.safetensors"))).collect();
    paths.iter().zip(STEPS).for_each(|(path, step)| save(path, &model(step), &[]));
    (temp, paths)
}

fn profiles() -> Vec<Profile> {
    let window = Window::Fraction(0.6);
    vec![
        Profile::sigma_rel(0.2).unwrap(),
        Profile::half_life(90.0).unwrap(),
        Profile::uniform(window).unwrap(),
        Profile::linear(window).unwrap(),
        Profile::lr_decay(Shape::Linear, window).unwrap(),
        Profile::lr_decay(Shape::Cosine, window).unwrap(),
        Profile::lr_decay(Shape::OneMinusSqrt, window).unwrap(),
        Profile::table(vec![(0.5, 0.2), (1.0, 1.0)]).unwrap(),
    ]
}

/// Returns the elements of a tensor as f64.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype {
        Dtype::F64 => tensor.to_vec::<f64>().unwrap(),
        Dtype::F32 => tensor.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect(),
        Dtype::F16 => tensor.to_vec::<f16>().unwrap().into_iter().map(f64::from).collect(),
        Dtype::BF16 => tensor.to_vec::<bf16>().unwrap().into_iter().map(f64::from).collect(),
        other => panic!("{other}"),
    }
}

/// Returns half a unit in the last place of a dtype, relative.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F64 => 2f64.powi(-53),
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

/// Compares an average with the sum, in f64, of the model at some steps.
fn assert_is_sum(found: &Tensors, steps: &[u64], weights: &[f64], dtype: Option<Dtype>) {
    let models: Vec<_> = steps.iter().map(|&step| model(step)).collect();
    let newest = models.last().unwrap();
    assert_eq!(found.len(), newest.len());
    for (i, (name, last)) in newest.iter().enumerate() {
        let average = found.get(name).unwrap();
        assert_eq!(average.shape, last.shape, "{name}");
        if !is_averaged(last.dtype) {
            assert_eq!(average, last, "{name}");
            continue;
        }
        assert_eq!(average.dtype, dtype.unwrap_or(last.dtype), "{name}");
        let values: Vec<Vec<f64>> = models.iter().map(|model| numbers(&model[i].1)).collect();
        for (k, is) in numbers(average).into_iter().enumerate() {
            let exact: f64 = values.iter().zip(weights).map(|(values, weight)| weight * values[k]).sum();
            let size: f64 = values.iter().zip(weights).map(|(values, weight)| (weight * values[k]).abs()).sum();
            // Half an ulp, or half of the smallest subnormal of f16, and the rounding of both sums.
            let allowed = rounding(average.dtype) * exact.abs()
                + 2f64.powi(-25) * f64::from(average.dtype == Dtype::F16)
                + 4.0 * weights.len() as f64 * 2f64.powi(-53) * size;
            assert!((is - exact).abs() <= allowed, "{name}[{k}] is {is}, not {exact}");
        }
    }
}

/// Returns the masses of the intervals between checkpoints, by definition.
fn masses(profile: &Profile, steps: &[u64], at: u64) -> Vec<f64> {
    let mut ends: Vec<f64> = steps.iter().map(|&step| step as f64).collect();
    *ends.last_mut().unwrap() = at as f64;
    let share = |end: f64| profile.cumulative(end, at as f64);
    (0..ends.len()).map(|i| share(ends[i]) - if i == 0 { 0.0 } else { share(ends[i - 1]) }).collect()
}

#[test]
fn averages_are_sums_of_the_checkpoints() {
    let (_temp, paths) = series();
    // Opened in any order.
    let checkpoints = Checkpoints::open(&[2, 0, 4, 1, 3].map(|i| &paths[i]), None).unwrap();
    assert_eq!(checkpoints.steps(), STEPS);
    assert!(checkpoints.paths().eq(paths.iter()));
    for (at, until) in [(At::Latest, 5), (At::Step(300), 4), (At::Step(339), 4), (At::Step(40), 1)] {
        for profile in profiles() {
            let merge = checkpoints.plan(profile.clone(), at).unwrap();
            let expected = masses(&profile, &STEPS[..until], merge.at);
            let weights: Vec<f64> = merge.weights.iter().map(|weight| weight.weight).collect();
            assert!(weights.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-15), "{weights:?} {expected:?}");
            assert_is_sum(&checkpoints.load(&merge).unwrap(), &STEPS[..until], &expected, None);
        }
    }
}

#[test]
fn written_averages_equal_loaded_ones_for_any_dtype_and_number_of_targets() {
    let (temp, paths) = series();
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    let merges = checkpoints.plans(&profiles(), At::Latest).unwrap();
    let out: Vec<PathBuf> = (0..merges.len()).map(|i| temp.path().join(format!("out/{i}.safetensors"))).collect();
    let outputs: Vec<(&Merge, &Path)> = merges.iter().zip(out.iter().map(PathBuf::as_path)).collect();
    for dtype in [None, Some(Dtype::F64), Some(Dtype::BF16)] {
        let options = WriteOptions { dtype, ..WriteOptions::default() };
        assert_eq!(checkpoints.write(&outputs, &options).unwrap(), Device::Cpu);
        for (merge, path) in &outputs {
            let weights = masses(&merge.profile, &STEPS, 340);
            let (tensors, metadata) = read(path);
            assert_is_sum(&tensors, &STEPS, &weights, dtype);
            assert_eq!((metadata["format"].as_str(), metadata["step"].as_str()), ("pt", "340"));
            assert_eq!(serde_json::from_str::<Profile>(&metadata["profile"]).unwrap(), merge.profile);
            if dtype.is_none() {
                assert_eq!(tensors, checkpoints.load(merge).unwrap(), "{}", merge.profile);
            }
        }
    }
    assert_eq!(fs::read_dir(temp.path().join("out")).unwrap().count(), merges.len(), "nothing else is left");
}

#[test]
fn checkpoints_without_weight_are_not_read() {
    let (temp, paths) = series();
    let mut broken = model(100);
    broken[0].1.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    save(&paths[1], &broken, &[]);
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    // The last 40 steps are the newest checkpoint alone; the last 50 include a part of the one before.
    for (window, used, effective) in [(40.0, 1, 1.0), (50.0, 2, 1.0 / (0.8f64.powi(2) + 0.2f64.powi(2)))] {
        let merge = checkpoints.plan(Profile::uniform(Window::Steps(window)).unwrap(), At::Latest).unwrap();
        assert!((merge.effective_checkpoints - effective).abs() < 1e-12);
        assert!(merge.warning().is_some_and(|text| text.contains("hardly an average")));
        let read = std::sync::atomic::AtomicU64::new(0);
        let progress = |bytes| {
            read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        };
        let out = temp.path().join("out.safetensors");
        let options = WriteOptions { progress: Some(&progress), ..WriteOptions::default() };
        checkpoints.write(&[(&merge, &out)], &options).unwrap();
        let each = 15 * 4 + 70 * 2 + 33 * 2 + 4 * 8 + 4;
        assert_eq!(read.into_inner(), used * each);
        assert_eq!(checkpoints.bytes_to_read(&[merge]), used * each);
    }
    let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
    assert!(merge.warning().is_none());
    let out = temp.path().join("deep/out.safetensors");
    let error = checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap_err().to_string();
    assert!(error.contains("step_100.safetensors: tensor `a.weight` holds NaN at element 0"), "{error}");
    assert!(!out.exists());
}

#[test]
fn alphas_of_adapters_are_copied_bit_for_bit() {
    let temp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (1..=3).map(|i| temp.path().join(format!("lora-00000{i}.safetensors"))).collect();
    let lora = |step: u64, alpha: f32| {
        let mut tensors = model(step);
        // Not a dyadic number: a sum of its thirds would differ.
        tensors.push(("unet.down.alpha", Tensor::new(&[], &[alpha]).unwrap()));
        tensors.push(("unet.down.lora_down.weight", Tensor::new(&[2], &[step as f32, 1.0]).unwrap()));
        // A trained parameter, not a scale.
        tensors.push(("snake.alpha", Tensor::new(&[1], &[step as f32]).unwrap()));
        tensors
    };
    let metadata = [("ss_network_dim", "16"), ("ss_steps", "30"), ("sshs_model_hash", "old"), ("format", "np")];
    for (i, path) in paths.iter().enumerate() {
        let steps = ["10", "20", "30"][i];
        let own: Vec<_> = metadata.iter().map(|&(k, v)| (k, if k == "ss_steps" { steps } else { v })).collect();
        save(path, &lora(i as u64, 0.7), &own);
    }
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    // Steps in metadata precede those in names.
    assert_eq!(checkpoints.steps(), [10, 20, 30]);
    assert!(!checkpoints.averaged().contains(&"unet.down.alpha".to_owned()));
    let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
    let out = temp.path().join("average.safetensors");
    checkpoints.write(&[(&merge, &out)], &WriteOptions { dtype: Some(Dtype::F16), ..Default::default() }).unwrap();
    let (tensors, metadata) = read(&out);
    assert_eq!(tensors.get("unet.down.alpha").unwrap(), &Tensor::new(&[], &[0.7f32]).unwrap());
    assert_eq!(numbers(tensors.get("snake.alpha").unwrap()), [1.0]);
    assert_eq!((metadata["ss_network_dim"].as_str(), metadata["ss_steps"].as_str()), ("16", "30"));
    assert_eq!(metadata["format"], "np");
    assert!(!metadata.contains_key("sshs_model_hash"));
    // A different scale in one of them.
    save(&paths[1], &lora(1, 0.5), &[("ss_steps", "20")]);
    let error = Checkpoints::open(&paths, None).unwrap_err().to_string();
    assert!(error.contains("lora-000002.safetensors: `unet.down.alpha`, the scale of a low-rank adapter"), "{error}");
}

/// Integers are copied anyway, but scales among them must still agree.
#[test]
fn alphas_of_any_dtype_must_agree() {
    let temp = tempfile::tempdir().unwrap();
    for factor in ["lora_down.weight", "lora.down.weight", "hada_w1_a", "lokr_w1", "oft_blocks", "weight"] {
        let factor = format!("x.{factor}");
        for alpha in [8i64, 16] {
            let tensors =
                [("x.alpha", Tensor::new(&[], &[alpha]).unwrap()), (&*factor, Tensor::new(&[1], &[1f32]).unwrap())];
            save(&temp.path().join(format!("lora-{alpha}.safetensors")), &tensors, &[]);
        }
        let opened = Checkpoints::open(&[temp.path()], None).map_err(|error| error.to_string());
        match factor == "x.weight" {
            true => assert!(opened.is_ok()),
            false => assert!(opened.unwrap_err().contains("`x.alpha`, the scale of a low-rank adapter"), "{factor}"),
        }
    }
}

#[test]
fn scales_in_peft_configurations_must_agree() {
    let temp = tempfile::tempdir().unwrap();
    let dirs = [1, 2].map(|step| temp.path().join(format!("checkpoint-{step}")));
    let tensors = [("x.lora_A.weight", Tensor::new(&[1], &[1f32]).unwrap())];
    for dir in &dirs {
        fs::create_dir(dir).unwrap();
        save(&dir.join("adapter_model.safetensors"), &tensors, &[]);
    }
    let open = |first: &str, second: &str| {
        [first, second]
            .iter()
            .zip(&dirs)
            .for_each(|(text, dir)| fs::write(dir.join("adapter_config.json"), text).unwrap());
        Checkpoints::open(&[temp.path()], None).map(drop).map_err(|error| error.to_string())
    };
    let same = r#"{"r": 8, "lora_alpha": 16.0, "rank_pattern": {}, "lora_dropout": 0.1}"#;
    assert_eq!(open(r#"{"r": 8, "lora_alpha": 16, "use_rslora": false, "lora_dropout": NaN}"#, same), Ok(()));
    for (other, part) in [
        (r#"{"r": 8, "lora_alpha": 32}"#, "`lora_alpha` is 32, but 16.0 in"),
        (r#"{"r": 4, "lora_alpha": 16}"#, "`r` is 4, but 8 in"),
        (r#"{"r": 8, "lora_alpha": 16, "alpha_pattern": {"x": 2}}"#, r#"`alpha_pattern` is {"x":2}, but null in"#),
        (r#"{"r": 8, "lora_alpha": 16, "rank_pattern": {"x": 2}}"#, r#"`rank_pattern` is {"x":2}, but {} in"#),
    ] {
        let text = open(same, other).unwrap_err();
        let named = |i: usize| text.contains(&*dirs[i].join("adapter_config.json").to_string_lossy());
        assert!(text.contains(part) && named(0) && named(1), "{text}");
    }
}
