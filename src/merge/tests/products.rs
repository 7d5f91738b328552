//! Averages of the products of low-rank adapters, compared with the whole products in f64.

use super::*;
use crate::checkpoint::AdapterProduct;

const ROWS: usize = 5;
const COLUMNS: usize = 12;
const RANK: usize = 2;

/// Returns a factor; all elements differ, and change from step to step.
fn factor(step: u64, seed: usize, shape: &[usize]) -> Tensor {
    let value = |i: usize| ((step as f64 * (0.61 + i as f64) + seed as f64 * 3.7 + (i * i) as f64 * 1.3).sin()) as f32;
    Tensor::new(shape, &(0..shape.iter().product()).map(value).collect::<Vec<f32>>()).unwrap()
}

/// Returns the product of two factors in f64.
fn product(up: &Tensor, down: &Tensor) -> Vec<f64> {
    let [up, down] = [up, down].map(numbers);
    let element = |i: usize, j: usize| (0..RANK).map(|k| up[i * RANK + k] * down[k * COLUMNS + j]).sum();
    (0..ROWS * COLUMNS).map(|i| element(i / COLUMNS, i % COLUMNS)).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Names of the two factors, and of their scale, in one convention.
struct Names {
    up: &'static str,
    down: &'static str,
    alpha: Option<&'static str>,
}

const CONVENTIONS: [Names; 6] = [
    Names { up: "x.lora_B.weight", down: "x.lora_A.weight", alpha: None },
    Names { up: "x.lora_B.default.weight", down: "x.lora_A.default.weight", alpha: None },
    Names { up: "x.lora_embedding_B", down: "x.lora_embedding_A", alpha: None },
    Names { up: "lora_unet_x.lora_up.weight", down: "lora_unet_x.lora_down.weight", alpha: Some("lora_unet_x.alpha") },
    Names { up: "x.lora.up.weight", down: "x.lora.down.weight", alpha: Some("x.alpha") },
    Names { up: "x.to_q_lora.up.weight", down: "x.to_q_lora.down.weight", alpha: Some("x.to_q_lora.alpha") },
];

fn open_products(dir: &Path) -> Result<Checkpoints> {
    let options = CheckpointOptions { product: AdapterProduct::Svd, ..Default::default() };
    Checkpoints::open_with(&[dir], &options)
}

/// Writes adapters of three steps, a linear one or a convolution, with one more tensor beside the factors.
fn adapters(dir: &Path, names: &Names, convolution: bool, alpha: impl Fn(u64) -> f32) {
    let [up, down] = match convolution {
        false => [vec![ROWS, RANK], vec![RANK, COLUMNS]],
        true => [vec![ROWS, RANK, 1, 1], vec![RANK, 3, 2, 2]],
    };
    for step in 1..=3 {
        let mut tensors = vec![
            (names.up, factor(step, 1, &up)),
            (names.down, factor(step, 2, &down)),
            ("norm.weight", factor(step, 3, &[4])),
        ];
        tensors.extend(names.alpha.map(|name| (name, Tensor::new(&[], &[alpha(step)]).unwrap())));
        save(&dir.join(format!("lora-{step}.safetensors")), &tensors, &[]);
    }
}

/// Checks an average against the whole products, whose weights are given, and the reported errors too.
fn assert_is_average_of_products(found: &Tensors, names: &Names, weights: &[f64; 3], errors: ProductErrors) {
    let mut whole = vec![0.0; ROWS * COLUMNS];
    for (step, weight) in (1..=3).zip(weights) {
        let [up, down] = [factor(step, 1, &[ROWS, RANK]), factor(step, 2, &[RANK, COLUMNS])];
        whole.iter_mut().zip(product(&up, &down)).for_each(|(sum, value)| *sum += weight * value);
    }
    let kept = product(found.get(names.up).unwrap(), found.get(names.down).unwrap());
    let off: Vec<f64> = kept.iter().zip(&whole).map(|(kept, whole)| kept - whole).collect();
    let is = norm(&off) / norm(&whole);
    assert!((is - errors.truncation_error).abs() < 1e-6, "{}: {is} {errors:?}", names.up);
    assert!(errors.truncation_error > 1e-3 && errors.factors_error > errors.truncation_error, "{errors:?}");
}

#[test]
fn products_are_averaged_in_every_convention() {
    let thirds = [1.0 / 3.0; 3];
    for (names, convolution) in CONVENTIONS.iter().flat_map(|names| [(names, false), (names, true)]) {
        let temp = tempfile::tempdir().unwrap();
        adapters(temp.path(), names, convolution, |_| 0.7);
        let checkpoints = open_products(temp.path()).unwrap();
        let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
        let loaded = checkpoints.load(&merge).unwrap();
        let errors = checkpoints.product_errors(&merge).unwrap().unwrap();
        assert_eq!(errors.pairs, 1);
        assert_is_average_of_products(&loaded, names, &thirds, errors);
        assert_eq!(loaded.get(names.up).unwrap().shape.len(), if convolution { 4 } else { 2 });
        // Other tensors are averaged as ever, and the scale is copied.
        let plain = Checkpoints::open(&[temp.path()], None).unwrap().load(&merge).unwrap();
        assert_eq!(loaded.get("norm.weight"), plain.get("norm.weight"));
        if let Some(alpha) = names.alpha {
            assert_eq!(loaded.get(alpha).unwrap(), &Tensor::new(&[], &[0.7f32]).unwrap());
        }
        let out = tempfile::tempdir().unwrap();
        // Several targets in one pass give the same files.
        let other = checkpoints.plan(Profile::gamma(3.0).unwrap(), At::Latest).unwrap();
        let [first, second] = ["first.safetensors", "second.safetensors"].map(|name| out.path().join(name));
        checkpoints.write(&[(&merge, &first), (&other, &second)], &WriteOptions::default()).unwrap();
        assert_eq!((read(&first).0, read(&second).0), (loaded, checkpoints.load(&other).unwrap()));
    }
}

#[test]
fn averages_of_products_count_the_scale_of_each() {
    let thirds_of = |alphas: [f64; 3]| alphas.map(|alpha| alpha / 3.0 / alphas[2]);
    let names = &CONVENTIONS[3];
    let temp = tempfile::tempdir().unwrap();
    adapters(temp.path(), names, false, |step| [8.0, 2.0, 4.0][step as usize - 1]);
    let plain = Checkpoints::open(&[temp.path()], None).unwrap_err().to_string();
    assert!(plain.contains("average their products with --product svd"), "{plain}");
    let check = |names: &Names, dir: &Path, alphas: [f64; 3]| {
        let checkpoints = open_products(dir).unwrap();
        let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
        let errors = checkpoints.product_errors(&merge).unwrap().unwrap();
        assert_is_average_of_products(&checkpoints.load(&merge).unwrap(), names, &thirds_of(alphas), errors);
    };
    check(names, temp.path(), [8.0, 2.0, 4.0]);
    // The scales of PEFT's folders, and those in the metadata of diffusers.
    for in_metadata in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let names = Names { up: "unet.x.lora_B.weight", down: "unet.x.lora_A.weight", alpha: None };
        for (step, alpha) in [(1, 8), (2, 2), (3, 4)] {
            let tensors = [
                (names.up, factor(step, 1, &[ROWS, RANK])),
                (names.down, factor(step, 2, &[RANK, COLUMNS])),
                ("norm.weight", factor(step, 3, &[4])),
            ];
            let dir = temp.path().join(format!("step-{step}"));
            fs::create_dir(&dir).unwrap();
            let metadata = format!(r#"{{"unet.lora_alpha": {alpha}, "text_encoder.lora_alpha": 1}}"#);
            let metadata = [("lora_adapter_metadata", &*metadata)];
            save(&dir.join("adapter_model.safetensors"), &tensors, if in_metadata { &metadata } else { &[] });
            if !in_metadata {
                fs::write(dir.join("adapter_config.json"), format!(r#"{{"r": 2, "lora_alpha": {alpha}}}"#)).unwrap();
            }
        }
        check(&names, temp.path(), [8.0, 2.0, 4.0]);
    }
}

#[test]
fn adapters_without_products_of_two_factors_are_refused() {
    let pair = || vec![("x.lora_A.weight", factor(1, 1, &[2, 3])), ("x.lora_B.weight", factor(1, 2, &[4, 2]))];
    let with = |name: &'static str, shape: &[usize]| {
        let mut tensors = pair();
        tensors.retain(|(other, _)| *other != name);
        tensors.push((name, factor(1, 3, shape)));
        tensors
    };
    for (tensors, part) in [
        (with("x.lora_magnitude_vector", &[4]), "`x.lora_magnitude_vector` is of DoRA, whose magnitudes"),
        (with("x.dora_scale", &[4]), "`x.dora_scale` is of DoRA, whose magnitudes"),
        (with("y.hada_w1_a", &[4, 2]), "`y.hada_w1_a` is of LoHa"),
        (with("y.lokr_w1", &[4, 2]), "`y.lokr_w1` is of LoKr"),
        (with("x.lora_mid.weight", &[2, 2, 3, 3]), "`x.lora_mid.weight` is of a convolution in three factors"),
        (with("x.lora_E", &[2, 1]), "`x.lora_E` is of AdaLoRA"),
        (with("x.scalar", &[]), "`x.scalar` is a further factor"),
        (with("y.lora_A.weight", &[2, 3]), "the factor `y.lora_A.weight` of an adapter has no `y.lora_B.weight`"),
        (with("x.lora_B.weight", &[4, 1]), "have the shapes [4, 1] and [2, 3], which have no product"),
        (vec![("w", factor(1, 1, &[2, 3]))], "it has no factors of an adapter"),
    ] {
        let temp = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            save(&temp.path().join(format!("lora-{step}.safetensors")), &tensors, &[]);
        }
        let text = open_products(temp.path()).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("lora-1.safetensors"), "{text}");
    }
    let temp = tempfile::tempdir().unwrap();
    for step in [1, 2] {
        let dir = temp.path().join(format!("checkpoint-{step}"));
        fs::create_dir(&dir).unwrap();
        save(&dir.join("adapter_model.safetensors"), &pair(), &[]);
        fs::write(dir.join("adapter_config.json"), r#"{"r": 2, "target_parameters": ["experts.w"]}"#).unwrap();
    }
    let text = open_products(temp.path()).unwrap_err().to_string();
    assert!(text.contains("adapter_config.json: its `target_parameters` have the factors of all experts"), "{text}");
}

#[test]
fn factor_that_is_not_finite_is_named_with_its_file() {
    let temp = tempfile::tempdir().unwrap();
    let names = &CONVENTIONS[0];
    adapters(temp.path(), names, false, |_| 1.0);
    let mut broken = factor(2, 2, &[RANK, COLUMNS]);
    broken.bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    let tensors = [(names.up, factor(2, 1, &[ROWS, RANK])), (names.down, broken), ("norm.weight", factor(2, 3, &[4]))];
    save(&temp.path().join("lora-2.safetensors"), &tensors, &[]);
    let checkpoints = open_products(temp.path()).unwrap();
    let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
    let text = checkpoints.load(&merge).unwrap_err().to_string();
    assert!(text.contains("lora-2.safetensors: tensor `x.lora_A.weight` holds NaN at element 1"), "{text}");
}
