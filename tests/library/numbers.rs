//! Extreme values, shapes, names and sizes, from the tracker to the file of an average.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::{bf16, f16};
use posthoc_ema::snapshot::StoredFile;
use posthoc_ema::{
    At, Checkpoints, Dtype, Error, PostHocEma, Precision, Profile, Run, Tensor, Tensors, Window, WriteOptions, verify,
};

fn target() -> Profile {
    Profile::sigma_rel(0.15).unwrap()
}

/// Returns names that can break file systems, terminals, JSON or patterns.
fn names() -> Vec<String> {
    let plain = [
        "",
        ".",
        "..",
        "/",
        "../../escape",
        "a/b",
        "a\\b",
        "*",
        "?[x]",
        "null",
        "0.average.w",
        "copied.w",
        "\"",
        "\\\"",
    ];
    let more = [
        "\u{0}",
        "\n",
        "\u{1b}[2J",
        " ",
        "\u{202e}rtl",
        "\u{4e2d}\u{6587}",
        "\u{1f600}",
        "e\u{301}",
        "\u{e9}",
        "w\u{ffff}",
    ];
    let mut names: Vec<String> = plain.into_iter().chain(more).map(str::to_owned).collect();
    names.push("long".repeat(20_000));
    names
}

#[test]
fn tensors_of_every_name_and_shape_are_tracked_and_synthesized() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let shapes: [&[usize]; 6] = [&[3], &[], &[0], &[2, 0, 5], &[1, 1, 1, 1, 1, 1, 1, 1, 3], &[1]];
    let model = |step: u64| -> Tensors {
        let tensor = |(i, name): (usize, String)| {
            let shape = shapes[i % shapes.len()];
            let values: Vec<f32> = (0..shape.iter().product()).map(|e| (step as usize * 7 + i + e) as f32).collect();
            (name, Tensor::new(shape, &values).unwrap())
        };
        names().into_iter().enumerate().map(tensor).collect()
    };
    for (precision, shard_size) in [(Precision::Compensated, 1 << 30), (Precision::Plain, 40)] {
        let options = PostHocEma::options(&dir).update_every(1).update_after_step(0).checkpoint_every(5);
        let mut ema = options.precision(precision).shard_size(shard_size).create(&model(0)).unwrap();
        for step in 1..=20 {
            ema.update(&model(step)).unwrap();
        }
        let live = ema.synthesize(target()).unwrap();
        ema.finish().unwrap();
        drop(ema);
        assert_eq!(verify(&dir, &mut |_| ()).unwrap().findings.len(), 0);
        // All tensors can be resumed.
        drop(PostHocEma::options(&dir).resume(&model(20)).unwrap());
        let run = Run::open(&dir).unwrap();
        let plan = run.plan(target(), At::Latest).unwrap();
        let average = run.load(&plan).unwrap();
        assert_eq!(average, live);
        let output = temp.path().join("average.safetensors");
        run.write(&plan, &output).unwrap();
        let file = StoredFile::open(&output).unwrap();
        assert_eq!(file.tensors().len(), names().len());
        // Elements grow evenly, so the average of element `i + e` is that of the first tensor plus `i + e`.
        let first = average.get("").unwrap().to_vec::<f32>().unwrap()[0];
        for (i, name) in names().iter().enumerate() {
            let stored = file.tensors().get(name).unwrap();
            assert_eq!(stored.shape, shapes[i % shapes.len()], "{name:?}");
            let tensor = average.get(name).unwrap();
            assert_eq!(file.bytes(stored), tensor.bytes, "{name:?}");
            for (e, value) in tensor.to_vec::<f32>().unwrap().iter().enumerate() {
                let expected = first + (i + e) as f32;
                assert!((value - expected).abs() <= 1e-5 * expected, "{name:?}: {value}, not {expected}");
            }
        }
        // The output can be merged like any checkpoint.
        let again = temp.path().join("again.safetensors");
        fs::copy(&output, &again).unwrap();
        let checkpoints = Checkpoints::open(&[&output, &again], Some(&[10, 20])).unwrap();
        let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
        assert_eq!(checkpoints.load(&merge).unwrap(), average);
        fs::remove_dir_all(&dir).unwrap();
    }
    let mut reserved = model(0);
    reserved.insert("__metadata__", Tensor::new(&[1], &[1.0f32]).unwrap());
    let text = PostHocEma::options(&dir).create(&reserved).err().unwrap().to_string();
    assert!(text.contains("reserves this name"), "{text}");
}

/// Compares averages of subnormal numbers with sums in f64, which are far more exact.
#[test]
fn subnormal_numbers_are_averaged_to_their_last_bit() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let value = |step: u64, i: usize| f32::from_bits((step as usize * 977 + i * 131) as u32 % 0x7f_ffff);
    let model = |step| vec![("w", (0..500).map(|i| value(step, i)).collect::<Vec<f32>>())];
    let options = PostHocEma::options(&dir).update_every(1).update_after_step(0).checkpoint_every(10);
    let mut ema = options.checkpoint_dtype(Dtype::F32).create(&model(0)).unwrap();
    let profiles = [0.05, 0.28].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap());
    let mut exact = vec![vec![0.0f64; 500]; 2];
    for step in 1..=10 {
        ema.update(&model(step)).unwrap();
        for (profile, exact) in profiles.iter().zip(&mut exact) {
            let one_minus_beta = profile.one_minus_beta((step - 1) as f64, step as f64);
            exact.iter_mut().enumerate().for_each(|(i, e)| *e += one_minus_beta * (f64::from(value(step, i)) - *e));
        }
    }
    ema.finish().unwrap();
    // The low-order term has no bits below those of subnormal numbers: each update may lose half a unit.
    let unit = f64::from(f32::from_bits(1));
    for (index, exact) in exact.iter().enumerate() {
        let file = StoredFile::open(&dir.join(format!("{index}.10.safetensors"))).unwrap();
        let stored: Vec<f32> = bytemuck::pod_collect_to_vec(file.bytes(file.tensors().get("w").unwrap()));
        for (stored, exact) in stored.iter().zip(exact) {
            assert!((f64::from(*stored) - exact).abs() <= 10.0 * unit, "{stored:e} beside {exact:e}");
        }
        assert!(stored.iter().any(|value| value.is_subnormal()), "no subnormal number was stored");
    }
    // The blend adds in f64, in which they are normal numbers, and rounds once.
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(target(), At::Latest).unwrap();
    let blended = run.load(&plan).unwrap().get("w").unwrap().to_vec::<f32>().unwrap();
    let sources: Vec<(f64, Vec<f32>)> = plan
        .weights
        .iter()
        .map(|weight| {
            let path = dir.join(format!("{}.{}.safetensors", weight.index, weight.step));
            let file = StoredFile::open(&path).unwrap();
            (weight.weight, bytemuck::pod_collect_to_vec(file.bytes(file.tensors().get("w").unwrap())))
        })
        .collect();
    for (i, blended) in blended.iter().enumerate() {
        let sum: f64 = sources.iter().map(|(weight, values)| weight * f64::from(values[i])).sum();
        assert!((f64::from(*blended) - sum).abs() <= 0.51 * unit, "{blended:e} beside {sum:e}");
    }
}

#[test]
fn numbers_at_the_ends_of_16_bit_ranges_are_averaged_or_refused() {
    let temp = tempfile::tempdir().unwrap();
    for (dtype, fits, beyond) in [(Dtype::F16, 65504.0f32, 65536.0), (Dtype::BF16, bf16::MAX.to_f32(), f32::MAX)] {
        for value in [fits, beyond, f16::from_bits(1).to_f32(), f32::MIN_POSITIVE] {
            let dir = temp.path().join(format!("{dtype}-{value:e}"));
            let model = vec![("large", vec![value; 9]), ("small", vec![0.5; 9])];
            let options = PostHocEma::options(&dir).update_every(1).update_after_step(0).checkpoint_every(5);
            let mut ema = options.checkpoint_dtype(dtype).create(&model).unwrap();
            (1..=10).for_each(|_| assert!(ema.update(&model).is_ok()));
            ema.finish().unwrap();
            let run = Run::open(&dir).unwrap();
            let plan = run.plan(target(), At::Latest).unwrap();
            let average = run.load(&plan).unwrap().get("large").unwrap().to_vec::<f32>().unwrap();
            assert!(average.iter().all(|average| average.is_finite()), "{dtype} {value}: {average:?}");
            if value >= fits {
                let off = average.iter().map(|average| (average / value - 1.0).abs()).fold(0.0, f32::max);
                assert!(off < 1e-6, "{dtype} {value}: {average:?}");
            }
            // A file in f16 cannot hold larger values: the write fails and leaves no file.
            let output = temp.path().join(format!("{dtype}-{value:e}.out"));
            let options = WriteOptions { dtype: Some(Dtype::F16), ..WriteOptions::default() };
            let output = [posthoc_ema::Output { plan: &plan, path: &output }];
            let written = run.write_all(&output, &options);
            assert_eq!(written.is_ok(), value <= 65504.0, "{dtype} {value}: {written:?}");
            if let Err(error) = written {
                assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor == "large"), "{error}");
                assert!(!output[0].path.exists());
            }
        }
    }
}

/// Tracks twice as many tensors as the largest models have; a header cannot hold a million.
#[test]
fn hundred_thousand_tensors_are_tracked_and_a_million_refused_at_creation() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let model = |count: usize, value: f32| -> BTreeMap<String, Vec<f32>> {
        (0..count).map(|i| (format!("layers.{i}.weight"), vec![value + i as f32])).collect()
    };
    let many = model(100_000, 1.0);
    let tensors = |model: &BTreeMap<String, Vec<f32>>| -> Tensors {
        model.iter().map(|(name, values)| (name.clone(), Tensor::new(&[1], values).unwrap())).collect()
    };
    let many = tensors(&many);
    let options = || PostHocEma::options(&dir).update_every(1).update_after_step(0).checkpoint_every(2);
    let mut ema = options().create(&many).unwrap();
    (1..=4).for_each(|_| assert!(ema.update(&many).is_ok()));
    ema.finish().unwrap();
    drop(ema);
    drop(options().resume(&many).unwrap());
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(target(), At::Latest).unwrap();
    let average = run.load(&plan).unwrap();
    assert_eq!(average.iter().count(), 100_000);
    let value = average.get("layers.77777.weight").unwrap().to_vec::<f32>().unwrap()[0];
    assert!((value - 77778.0).abs() < 0.02, "{value}");
    let text = PostHocEma::options(temp.path().join("more")).create(&tensors(&model(1_000_000, 1.0)));
    let text = text.err().unwrap().to_string();
    assert!(text.contains("of 1000000 tensors the header") && text.contains("join small tensors"), "{text}");
    assert!(!temp.path().join("more").exists());
}

#[test]
fn file_of_a_million_tensors_can_be_merged() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("model.safetensors");
    let entry =
        |i: usize| format!(r#""t{i:06}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4);
    let header = format!("{{{}}}", (0..1_000_000).map(entry).collect::<Vec<_>>().join(","));
    let data: Vec<u8> = (0..1_000_000).flat_map(|i| (i as f32).to_le_bytes()).collect();
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
    let again = temp.path().join("again.safetensors");
    fs::copy(&path, &again).unwrap();
    let checkpoints = Checkpoints::open(&[&path, &again], Some(&[1, 2])).unwrap();
    let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
    let output = temp.path().join("average.safetensors");
    checkpoints.write(&[(&merge, &output)], &WriteOptions::default()).unwrap();
    let file = StoredFile::open(&output).unwrap();
    assert_eq!(file.tensors().len(), 1_000_000);
    assert_eq!(file.bytes(file.tensors().get("t654321").unwrap()), 654321f32.to_le_bytes());
}

/// Blends a tensor of more than 2^32 elements from sparse files. The output is not sparse.
#[test]
#[ignore = "writes 8.6 GB"]
fn tensor_of_more_than_2_to_32_elements_is_blended() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    fs::create_dir(&dir).unwrap();
    let elements = (1u64 << 32) + 5;
    let places = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, elements - 1];
    for (step, scale) in [(50u64, 1.0f32), (100, 3.0)] {
        sparse(&dir.join(format!("0.{step}.safetensors")), step, elements, &places, scale);
    }
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(Profile::sigma_rel(0.05).unwrap(), At::Latest).unwrap();
    let output = temp.path().join("average.safetensors");
    run.write(&plan, &output).unwrap();
    let file = StoredFile::open(&output).unwrap();
    let bytes = file.bytes(file.tensors().get("w").unwrap());
    let read = |i: u64| f16::from_le_bytes([bytes[2 * i as usize], bytes[2 * i as usize + 1]]).to_f64();
    let weight = |step| plan.weights.iter().find(|weight| weight.step == step).map_or(0.0, |weight| weight.weight);
    for (k, &place) in places.iter().enumerate() {
        let exact = (weight(50) + 3.0 * weight(100)) * (k + 1) as f64;
        assert!((read(place) - exact).abs() <= exact.abs() * 2f64.powi(-11), "{place}: {}, not {exact}", read(place));
    }
    let others = [2, (1 << 31) + 1, (1u64 << 32) + 2, elements - 2];
    assert!(others.iter().all(|&place| read(place) == 0.0));
    // Nonzero MiB: the first one, and one on each side of 2^32 and of 2^33 bytes.
    let nonzero = bytes.chunks(1 << 20).filter(|chunk| chunk.iter().any(|&byte| byte != 0)).count();
    assert_eq!(nonzero, 5, "{nonzero} MiB are not zero");
}

/// Writes a snapshot of one f16 tensor that is zero except at `places`.
fn sparse(path: &Path, step: u64, elements: u64, places: &[u64], scale: f32) {
    let metadata = serde_json::json!({
        "posthoc_ema": "1", "profile": r#"{"kind":"power","gamma":6.94}"#, "step": step.to_string(),
        "history": format!("[[10,{step},10]]"),
    });
    let tensor = serde_json::json!({"dtype": "F16", "shape": [elements], "data_offsets": [0, 2 * elements]});
    let header = serde_json::json!({"__metadata__": metadata, "w": tensor}).to_string();
    let data = 8 + header.len() as u64;
    let file = fs::File::create(path).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(header.as_bytes(), 8).unwrap();
    file.set_len(data + 2 * elements).unwrap();
    for (k, place) in places.iter().enumerate() {
        let value = f16::from_f32(scale * (k + 1) as f32);
        file.write_all_at(&value.to_le_bytes(), data + 2 * place).unwrap();
    }
}
