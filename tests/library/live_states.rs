//! Live states of older versions, and those that older versions refuse.

use std::path::{Path, PathBuf};

use half::bf16;
use posthoc_ema::compute::cpu::low_order;
use posthoc_ema::snapshot::StoredFile;
use posthoc_ema::{Dtype, PostHocEma, Precision, Profile, SavedState};

/// State after 2,000 updates with [`model`], written when low-order terms were bf16.
fn old_state() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/states/bf16-terms.safetensors")
}

fn model(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    let value = |i: u64| {
        let noise = (step * 7919 + i * 104_729) % 1009;
        (i as f32 - 11.0) * 0.37 + (noise as f32 / 1009.0 - 0.5) * 1e-3
    };
    vec![("w", (0..23).map(value).collect()), ("tiny", (0..5).map(|i| value(i) * 1e-30).collect())]
}

/// Returns a tensor's values with their low-order terms, of either kind.
fn values(file: &StoredFile, index: usize, name: &str) -> Vec<(f32, f64)> {
    let tensor = |part: &str| file.tensors().get(&format!("{index}.{part}.{name}")).unwrap();
    let highs: Vec<f32> = bytemuck::pod_collect_to_vec(file.bytes(tensor("average")));
    let lows: Vec<u16> = bytemuck::pod_collect_to_vec(file.bytes(tensor("low")));
    let decode = |high: f32, low: u16| match tensor("low").dtype {
        Dtype::BF16 => bf16::from_bits(low).to_f64(),
        Dtype::I16 => low_order::decode(high, low as i16).into(),
        other => panic!("{other}"),
    };
    highs.into_iter().zip(lows).map(|(high, low)| (high, decode(high, low))).collect()
}

#[test]
fn state_with_bf16_terms_resumes_with_equal_averages() {
    let temp = tempfile::tempdir().unwrap();
    let old = StoredFile::open(&old_state()).unwrap();
    assert_eq!(old.metadata()["posthoc_ema"], "1");
    let ema = PostHocEma::options(temp.path().join("run")).resume_from(old_state(), &model(2000)).unwrap();
    assert_eq!(ema.step(), 2000);
    let path = temp.path().join("new.safetensors");
    ema.save_to(&path).unwrap();
    let new = StoredFile::open(&path).unwrap();
    assert_eq!(new.metadata()["posthoc_ema"], "3");
    let mut terms = 0;
    for (index, name) in [(0, "w"), (1, "w"), (0, "tiny"), (1, "tiny")] {
        for ((high, low), (old_high, old_low)) in values(&new, index, name).into_iter().zip(values(&old, index, name)) {
            assert_eq!(high.to_bits(), old_high.to_bits());
            // A term of 16 bits holds the nearest 2^-38 of the value.
            assert!((low - old_low).abs() <= f64::from(high.abs()) * 2f64.powi(-38), "{high:e}: {low:e}, {old_low:e}");
            terms += usize::from(low != 0.0);
        }
    }
    assert!(terms > 40, "{terms}");
}

#[test]
fn run_with_bf16_terms_goes_on_to_the_average_in_f64() {
    let temp = tempfile::tempdir().unwrap();
    let mut ema = PostHocEma::options(temp.path().join("run")).resume_from(old_state(), &model(2000)).unwrap();
    let mut exact = [[0f64; 23]; 2];
    for step in 1..=4000 {
        if step > 2000 {
            ema.update(&model(step)).unwrap();
        }
        for (profile, exact) in ema.profiles().iter().zip(&mut exact) {
            let weight = profile.one_minus_beta((step - 1) as f64, step as f64);
            exact.iter_mut().zip(&model(step)[0].1).for_each(|(e, &p)| *e += weight * (f64::from(p) - *e));
        }
    }
    let path = temp.path().join("new.safetensors");
    ema.save_to(&path).unwrap();
    let new = StoredFile::open(&path).unwrap();
    for (index, exact) in exact.iter().enumerate() {
        for ((high, low), exact) in values(&new, index, "w").into_iter().zip(exact) {
            assert!((f64::from(high) + low - exact).abs() <= 1e-8 * exact.abs().max(1.0), "{high:e}, {exact:e}");
        }
    }
}

/// Older versions read versions 1 and 2, which promises them bf16 terms or none.
#[test]
fn version_of_a_state_says_which_terms_it_holds() {
    for (precision, version) in [(Precision::Compensated, "3"), (Precision::Plain, "1")] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("run");
        let profiles = [Profile::sigma_rel(0.05).unwrap()];
        let options = PostHocEma::options(&dir).profiles(profiles).precision(precision).update_every(1);
        let mut ema = options.update_after_step(0).checkpoint_every(5).create(&model(0)).unwrap();
        for step in 1..=5 {
            ema.update(&model(step)).unwrap();
        }
        ema.finish().unwrap();
        drop(ema);
        assert_eq!(StoredFile::open(&dir.join("state.safetensors")).unwrap().metadata()["posthoc_ema"], version);
        assert_eq!(StoredFile::open(&dir.join("0.5.safetensors")).unwrap().metadata()["posthoc_ema"], "1");
        assert_eq!(SavedState::of(&dir).unwrap().unwrap().step, 5);
        assert_eq!(PostHocEma::options(&dir).resume(&model(5)).unwrap().step(), 5);
    }
}
