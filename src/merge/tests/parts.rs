//! Averages of the products of adapters that are written in parts.

use super::*;
use crate::checkpoint::AdapterProduct;
use crate::synthesis::OutputPart;

/// Returns a factor; all elements differ, and change from step to step.
fn factor(step: usize, seed: usize, shape: &[usize]) -> Tensor {
    let value = |i: usize| ((step * (3 + i) + seed * 37 + i * i % 101) as f32 * 0.61).sin();
    Tensor::new(shape, &(0..shape.iter().product()).map(value).collect::<Vec<f32>>()).unwrap()
}

#[test]
fn parts_of_averaged_products_are_those_of_one_pass() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("adapters");
    std::fs::create_dir(&dir).unwrap();
    for step in 1..=3 {
        let tensors = [
            ("norm.weight", factor(step, 3, &[1500])),
            ("x.lora_A.weight", factor(step, 2, &[2, 900])),
            ("x.lora_B.weight", factor(step, 1, &[700, 2])),
        ];
        save(&dir.join(format!("lora-{step}.safetensors")), &tensors, &[]);
    }
    let options = CheckpointOptions { product: AdapterProduct::Svd, ..Default::default() };
    let open = || Checkpoints::open_with(&[&dir], &options).unwrap();
    let merge = open().plan(Profile::uniform(Window::Steps(3.0)).unwrap(), At::Latest).unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| temp.path().join(name));
    open().write(&[(&merge, &whole)], &WriteOptions::default()).unwrap();
    for number in [2, 4, 1, 3] {
        assert!(!parts.exists());
        let part = OutputPart::new(number, 4).unwrap();
        open().write_part(&[(&merge, &parts)], &OutputForm::default(), &WriteOptions::default(), part).unwrap();
    }
    assert!(std::fs::read(parts).unwrap() == std::fs::read(whole).unwrap());
}
