//! Decays that the files of a training record.

use super::*;
use crate::import::tests::pt::Pt;

/// Returns a pickled float.
fn float(value: f64) -> Vec<u8> {
    [b"G", &value.to_be_bytes()[..]].concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// Returns a pickled `argparse.Namespace`.
fn namespace(arguments: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = arguments.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
    [b"cargparse\nNamespace\n)\x81}(", &items[..], b"ub"].concat()
}

/// Saves the average at each of the steps under this key, with the arguments of the training.
fn training(key: &str, ema: &EmaLoop, arguments: &dyn Fn(u64) -> Vec<u8>) -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    fs::create_dir(temp.path().join("out")).unwrap();
    let averages: Vec<Vec<f64>> = (0..ELEMENTS).map(|i| ema.averages(300, i)).collect();
    for step in [50, 100, 150, 200, 250, 300] {
        let values: Vec<f32> = averages.iter().map(|averages| averages[step as usize] as f32).collect();
        let pt = Pt::default().nested(key, "w", &values).entry("args", &arguments(step));
        pt.save(temp.path().join(format!("out/step-{step}.pth.tar")));
    }
    temp
}

fn warmed(k: f64) -> f64 {
    1.0 - (1.0 + k).powf(-2.0 / 3.0)
}

#[test]
fn decay_and_warm_up_of_timm_are_read_from_the_arguments() {
    for (warmup, ramp) in [(b"\x89", no_ramp as fn(f64) -> f64), (b"\x88", warmed)] {
        let ema = EmaLoop { ramp, start: 1, ..EmaLoop::constant(0.9) };
        let arguments = [
            ("lr", float(0.1)),
            ("model_ema", b"\x88".to_vec()),
            ("model_ema_decay", float(0.9)),
            ("model_ema_warmup", warmup.to_vec()),
        ];
        let temp = training("state_dict_ema", &ema, &|_| namespace(&arguments));
        let import = ImportAverages::default();
        let notes = import.open(temp.path().join("out")).unwrap().notes().join("\n");
        assert!(notes.contains("the decay 0.9") && notes.contains("is that of `args.model_ema_decay`"), "{notes}");
        assert_eq!(notes.contains("with timm's warm-up"), warmup == b"\x88", "{notes}");
        let (dir, _) = imported(&import, &temp);
        let worst = check(&dir, &[Profile::sigma_rel(0.1).unwrap()], 1e-5, &|_, step| ema.response(step));
        assert!(worst < 1.0, "{worst}");
    }
}

#[test]
fn decay_of_another_trainer_is_read_from_its_arguments() {
    let ema = EmaLoop::constant(0.8);
    let temp = training("model_ema", &ema, &|_| namespace(&[("ema_decay", float(0.8)), ("use_ema", b"\x88".to_vec())]));
    let import = ImportAverages { update_every: Some(1), ..Default::default() };
    let found = import.open(temp.path().join("out")).unwrap();
    assert!(found.notes().join("\n").contains("the decay 0.8 is that of `args.ema_decay`"), "{:?}", found.notes());
    // The option counts.
    let given = ImportAverages { decays: vec![AverageDecay::Ema(EmaDecay::constant(0.7))], ..import };
    assert!(!given.open(temp.path().join("out")).unwrap().notes().join("\n").contains("ema_decay"));
}

#[test]
fn recorded_decays_that_may_not_hold_are_refused() {
    let ema = EmaLoop::constant(0.8);
    let import = ImportAverages { update_every: Some(1), ..Default::default() };
    for (arguments, expected) in [
        (
            &(|_| namespace(&[("model_ema_decay", float(0.8)), ("model_ema_steps", b"K\x20".to_vec())]))
                as &dyn Fn(u64) -> Vec<u8>,
            "but also `args.model_ema_steps`, which may change the decay",
        ),
        (&|step| namespace(&[("ema_decay", float(1.0 - 1.0 / step as f64))]), "different decays, 0.98 and 0.99"),
        (&|_| namespace(&[("ema_decay", float(1.5))]), "the files record `args.ema_decay`: "),
        (&|_| namespace(&[("lr", float(0.1))]), "the files do not record the decay"),
    ] {
        let temp = training("model_ema", &ema, arguments);
        let error = import.open(temp.path().join("out")).unwrap_err().to_string();
        assert!(error.contains("option beta: ") && error.contains(expected), "{error}");
    }
}

#[test]
fn decay_of_torchvision_is_adjusted_as_its_training_does() {
    // References of torchvision: `adjust = world_size * batch_size * model_ema_steps / epochs`.
    let arguments = |batch: u8| {
        namespace(&[
            ("model_ema", b"\x88".to_vec()),
            ("model_ema_decay", float(0.99998)),
            ("model_ema_steps", b"K\x20".to_vec()),
            ("world_size", b"K\x08".to_vec()),
            ("batch_size", vec![b'K', batch]),
            ("epochs", b"M\x58\x02".to_vec()),
        ])
    };
    let import = ImportAverages { update_every: Some(1), ..Default::default() };
    for (batch, expected) in [(128, "0.9989077333333323"), (255, "0.9978239999999978")] {
        let temp = training("model_ema", &EmaLoop::constant(0.9), &|_| arguments(batch));
        let notes = import.open(temp.path().join("out")).unwrap().notes().join("\n");
        let text = format!("the decay {expected}");
        assert!(notes.contains(&text) && notes.contains("by torchvision's adjustment of 0.99998, is that"), "{notes}");
    }
}

#[test]
fn decays_are_read_from_names() {
    let ema = EmaLoop::constant(0.9);
    let steps = [50, 100, 150, 200, 250, 300];
    let import = ImportAverages { update_every: Some(1), ..Default::default() };
    let out = |name: &dyn Fn(u64) -> String| {
        let temp = tempfile::tempdir().unwrap();
        save_averages(&temp, &ema, &steps, name);
        temp
    };
    for name in [
        &(|step| format!("ema_0.90-step{step}.safetensors")) as &dyn Fn(u64) -> String,
        &|step| format!("checkpoint-{step}-ema0.9.safetensors"),
        &|step| format!("checkpoint-{step}-ema=0.9/model.safetensors"),
    ] {
        let temp = out(name);
        let found = import.open(temp.path().join("out")).unwrap();
        assert!(found.notes().join("\n").contains("is that in the names of the files"), "{:?}", found.notes());
        let (dir, report) = imported(&import, &temp);
        assert_eq!((report.profiles, &report.steps[..]), (vec![Profile::beta(0.9).unwrap()], &steps[..]));
        check(&dir, &[Profile::sigma_rel(0.1).unwrap()], 1e-11, &|_, step| ema.response(step));
    }
    for (name, part) in [
        (
            &(|step: u64| format!("ema0.9{}-step{step}.safetensors", step % 3)) as &dyn Fn(u64) -> String,
            "different decays, 0.9",
        ),
        (&|step| format!("schema0.9-{step}.safetensors"), "the files do not record the decay"),
        (&|step| format!("ema-{step}.safetensors"), "the files do not record the decay"),
    ] {
        let error = import.open(out(name).path().join("out")).unwrap_err().to_string();
        assert!(error.contains("option beta: ") && error.contains(part), "{error}");
    }
}
