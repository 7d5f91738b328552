//! Files as timm, Lightning, ultralytics, diffusers and EDM2 name and fill them.

use std::fs;

use super::*;
use crate::import::tests::pt::Pt;

/// Updates of all trainings here end at this step.
const LAST: u64 = 600;

fn f32s(values: impl Fn(usize) -> f64) -> [f32; ELEMENTS] {
    std::array::from_fn(|i| values(i) as f32)
}

fn int(value: u64) -> Vec<u8> {
    [b"J", &(value as u32).to_le_bytes()[..]].concat()
}

/// Writes files of PyTorch: each is made of the average and the raw weights of its step.
fn checkpoints(ema: &EmaLoop, steps: &[u64], make: impl Fn(u64, &[f32], &[f32]) -> (String, Pt)) -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    fs::create_dir(temp.path().join("out")).unwrap();
    let averages: Vec<Vec<f64>> = (0..ELEMENTS).map(|i| ema.averages(LAST, i)).collect();
    for &step in steps {
        let average = f32s(|i| averages[i][step as usize]);
        let (name, pt) = make(step, &average, &f32s(|i| value(step, i)));
        pt.save(temp.path().join("out").join(name));
    }
    temp
}

fn every_50() -> Vec<u64> {
    (1..=LAST / 50).map(|i| i * 50).collect()
}

fn near() -> Vec<Profile> {
    vec![Profile::sigma_rel(0.15).unwrap(), Profile::beta(0.98).unwrap()]
}

fn with_raw(ema: EmaLoop) -> impl Fn(usize, u64) -> Vec<f64> {
    move |index, step| if index == 0 { ema.response(step) } else { raw(step) }
}

/// timm numbers its files by epochs; its `ModelEmaV3` copies the weights at step 1.
#[test]
fn timm_s_checkpoints_need_their_steps() {
    let inverse = |k: f64| 1.0 - (1.0 + k).powf(-2.0 / 3.0);
    let ema = EmaLoop { start: 1, ramp: inverse, ..EmaLoop::constant(0.95) };
    let temp = checkpoints(&ema, &every_50(), |step, average, raw| {
        let pt = Pt::default().nested("state_dict_ema", "w", average).nested("state_dict", "w", raw);
        (format!("checkpoint-{}.pth.tar", step / 50), pt.entry("epoch", &int(step / 50)))
    });
    fs::copy(temp.path().join("out/checkpoint-12.pth.tar"), temp.path().join("out/last.pth.tar")).unwrap();
    let decay = EmaDecay { ramp: Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }, ..EmaDecay::constant(0.95) };
    let import = ImportAverages { update_every: None, ..options(decay, 1) };
    let error = import.open(temp.path().join("out")).unwrap_err().to_string();
    assert!(error.contains("the number of an epoch") && error.contains("--steps"), "{error}");
    let import = ImportAverages { steps: Some(every_50()), ..import };
    let (dir, report) = imported(&import, &temp);
    assert_eq!((report.snapshots, report.profiles[1].to_string()), (24, "raw weights".to_owned()));
    assert!(report.warnings[0].contains("`last.pth.tar`"), "{:?}", report.warnings);
    check(&dir, &near(), 1e-5, &with_raw(ema));
}

#[test]
fn lightning_s_count_of_updates_confirms_the_options() {
    let ema = EmaLoop { start: 21, every: 10, ..EmaLoop::constant(0.8) };
    let steps = every_50();
    let temp = checkpoints(&ema, &steps, |step, average, raw| {
        let counted = (step - 21) / 10 + 1;
        let pt = Pt::default().nested("state_dict", "w", average).nested("current_model_state", "w", raw);
        let count = Pt::default().entry("n_averaged", &int(counted));
        let pt = pt.entry("averaging_state", &count.pickle()[2..count.pickle().len() - 1]);
        (format!("epoch=0-step={step}.ckpt"), pt.entry("global_step", &int(step)).entry("epoch", &int(0)))
    });
    let import = options(EmaDecay::constant(0.8), 10);
    for (import, part) in [(import.clone(), "would be 5"), (options(EmaDecay::constant(0.8), 1), "would be 50")] {
        let error = import.open(temp.path().join("out")).unwrap_err().to_string();
        assert!(error.contains("`n_averaged` is 3") && error.contains(part), "{error}");
    }
    // EMAWeightAveraging's update_starting_at_step is an index, and updates are at its multiples of 10.
    let import = ImportAverages { update_after_step: Some(14), ..import };
    let found = import.open(temp.path().join("out")).unwrap();
    assert!(found.notes()[0].contains("Lightning: `state_dict` is the average"), "{:?}", found.notes());
    let (dir, report) = imported(&import, &temp);
    assert_eq!((report.snapshots, &report.steps), (2 * steps.len(), &steps));
    check(&dir, &near(), 1e-5, &with_raw(ema));
}

#[test]
fn ultralytics_steps_are_its_updates() {
    let ema = EmaLoop { ramp: |k| 0.99 * (1.0 - (-k / 100.0).exp()), ..EmaLoop::constant(0.99) };
    let temp = checkpoints(&ema, &every_50(), |step, average, _| {
        let pt = Pt::default().nested("ema", "w", average).entry("model", b"N");
        (format!("epoch{}.pt", step / 50), pt.entry("updates", &int(step)).entry("epoch", &int(step / 50)))
    });
    let decay = EmaDecay { ramp: Ramp::Exponential { tau: 100.0 }, ..EmaDecay::constant(0.99) };
    let import = ImportAverages { update_every: None, ..options(decay, 1) };
    let (dir, report) = imported(&import, &temp);
    assert_eq!(report.steps, every_50());
    check(&dir, &near(), 1e-5, &|_, step| ema.response(step));
}

fn diffusers(temp: &TempDir, ema: &EmaLoop, steps: &[u64]) {
    save_averages(temp, ema, steps, &|step| format!("checkpoint-{step}/unet_ema/diffusion_pytorch_model.safetensors"));
    for &step in steps {
        let folder = temp.path().join(format!("out/checkpoint-{step}"));
        let path = folder.join("unet/diffusion_pytorch_model.safetensors");
        save(&path, std::array::from_fn(|i| value(step, i)));
        config(&folder.join("unet_ema"), 0.95, step);
        fs::write(folder.join("unet/config.json"), "{}").unwrap();
    }
}

fn config(folder: &Path, decay: f64, step: u64) {
    let config = serde_json::json!({
        "decay": decay, "min_decay": 0.0, "optimization_step": step, "update_after_step": 20, "use_ema_warmup": false,
        "inv_gamma": 1.0, "power": 0.6666666666666666,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn diffusers_folders_record_decay_and_step() {
    let ema = EmaLoop { start: 21, ramp: |k| (1.0 + k) / (10.0 + k), ..EmaLoop::constant(0.95) };
    let temp = tempfile::tempdir().unwrap();
    diffusers(&temp, &ema, &every_50());
    let (dir, report) = imported(&ImportAverages::default(), &temp);
    assert_eq!((report.snapshots, &report.steps), (24, &every_50()));
    check(&dir, &near(), 1e-11, &with_raw(ema));
    let out = temp.path().join("out");
    let refused = |import: &ImportAverages| import.open(&out).unwrap_err().to_string();
    let other = refused(&options(EmaDecay::constant(0.999), 1));
    assert!(other.contains("the files record of decay 0.95 after a ramp"), "{other}");
    let every = refused(&ImportAverages { update_every: Some(2), ..Default::default() });
    assert!(every.contains("has 50 updates, every 2 steps"), "{every}");
    config(&out.join("checkpoint-300/unet_ema"), 0.9, 300);
    let differs = refused(&ImportAverages::default());
    assert!(differs.contains("checkpoint-300") && differs.contains("the decay of the average"), "{differs}");
}

/// EDM2 updates both averages with every batch. The closed form takes updates as dense.
#[test]
fn edm2_s_names_have_times_and_lengths() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    let lengths = [0.05, 0.10].map(|length| Profile::sigma_rel(length).unwrap());
    // 4,096 images a batch, as thousands of images.
    let times: Vec<f64> = (1..=1000).map(|i| f64::from(i) * 4.096).collect();
    for kimg in (1..=16).map(|i| i * 256) {
        for (profile, length) in lengths.iter().zip(["0.050", "0.100"]) {
            let average = |i: usize| {
                let mut average = 0.0;
                let mut before = 0.0;
                for &time in times.iter().filter(|time| **time < kimg as f64 + 1.0) {
                    average += profile.one_minus_beta(before, time) * (value(time as u64, i) - average);
                    before = time;
                }
                average
            };
            let pt = Pt::default().nested("ema", "w", &f32s(average));
            pt.save(out.join(format!("network-snapshot-{kimg:07}-{length}.pkl")));
        }
        fs::write(out.join(format!("training-state-{kimg:07}.pt")), "state").unwrap();
    }
    let (dir, report) = imported(&ImportAverages::default(), &temp);
    assert_eq!((report.snapshots, report.profiles.as_slice()), (32, &lengths[..]));
    let run = Run::open(&dir).unwrap();
    for sigma_rel in [0.05, 0.075, 0.13] {
        let target = Profile::sigma_rel(sigma_rel).unwrap();
        let plan = run.plan(target.clone(), At::Latest).unwrap();
        assert!(plan.relative_error < 0.03, "{sigma_rel}: {}", plan.relative_error);
        let elements = run.load(&plan).unwrap().get("w").unwrap().to_vec::<f32>().unwrap();
        for (i, &element) in elements.iter().enumerate() {
            let mut exact = 0.0;
            let mut before = 0.0;
            for &time in &times {
                let share = target.cumulative(time, 4096.0) - target.cumulative(before, 4096.0);
                exact += share * value(time as u64, i);
                before = time;
            }
            // Names round to thousands of images, of which a batch has four.
            let difference = (f64::from(element) - exact).abs();
            assert!(difference < 5e-3 * exact.abs().max(1.0), "{sigma_rel}, {i}: {element} is not {exact}");
        }
    }
    let error = options(EmaDecay::constant(0.9), 1).open(&out).unwrap_err().to_string();
    assert!(error.contains("option beta") && error.contains("leave it out"), "{error}");
}

/// The loops of `improved-diffusion` and `guided-diffusion` save before they count a step.
#[test]
fn openai_s_names_have_steps_and_decays() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    let loops = [EmaLoop::constant(0.9), EmaLoop::constant(0.97)];
    let counts: Vec<u64> = (0..=300).step_by(25).collect();
    for (ema, decay) in loops.iter().zip(["0.9", "0.97"]) {
        let averages: Vec<Vec<f64>> = (0..ELEMENTS).map(|i| ema.averages(301, i)).collect();
        for &count in &counts {
            let average = f32s(|i| averages[i][count as usize + 1]);
            Pt::default().floats("w", &average).save(out.join(format!("ema_{decay}_{count:06}.pt")));
        }
    }
    for &count in &counts {
        Pt::default().floats("w", &f32s(|i| value(count + 1, i))).save(out.join(format!("model{count:06}.pt")));
        Pt::default().nested("state", "m", &[1.0]).save(out.join(format!("opt{count:06}.pt")));
    }
    let import = ImportAverages::default();
    let notes = import.open(&out).unwrap().notes().join("\n");
    assert!(notes.contains("the decay 0.97 is that in the names of `ema_0.97_*.pt`"), "{notes}");
    let (dir, report) = imported(&import, &temp);
    assert_eq!((report.snapshots, report.profiles.len(), report.steps[1]), (3 * counts.len(), 3, 26));
    let response = |index: usize, step: u64| match loops.get(index) {
        Some(ema) => ema.response(step),
        None => (0..=step).map(|t| f64::from(t == step)).collect(),
    };
    let worst = check(&dir, &near(), 1e-5, &response);
    assert!(worst < 0.5, "{worst}");
    for import in [options(EmaDecay::constant(0.9), 1), ImportAverages { steps: Some(vec![1]), ..Default::default() }] {
        let error = import.open(&out).unwrap_err().to_string();
        assert!(error.contains("the names of these averages have their steps and decays: leave it out"), "{error}");
    }
}
