//! Metadata of a snapshot: profiles, histories, dtypes and names as hostile text.

use std::collections::HashMap;
use std::fs;

use posthoc_ema::math::History;
use posthoc_ema::{At, Profile, Run, Tensors};
use safetensors::{Dtype, tensor::TensorView};

use super::{check_error, scratch};

/// Most times of a history that is solved. A run may have 2^26.
const MAX_TIMES: usize = 2_000;

/// Writes lines of `key=value` as the metadata of two snapshots of a run, and opens, plans and blends it.
pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let dir = scratch();
    for step in [50, 100] {
        let mut metadata = default_metadata(step);
        metadata.extend(text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())));
        let values = [1.0f32, 0.5, 0.25, 2.0].map(f32::to_le_bytes).concat();
        let tensor = |shape: &[usize], bytes| TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
        let tensors = [("w", tensor(&[3], &values[..12])), ("b", tensor(&[], &values[12..]))];
        let file = safetensors::serialize(tensors, Some(metadata)).unwrap();
        fs::write(dir.path().join(format!("0.{step}.safetensors")), file).unwrap();
    }
    check_values(text);
    let run = match Run::open(dir.path()) {
        Ok(run) => run,
        Err(error) => return check_error(&error, dir.path()),
    };
    let Some(times) = run.history().map(History::times) else { return };
    assert!(times.is_sorted_by(|a, b| a < b) && times.last() == Some(&100), "{times:?}");
    if times.len() > MAX_TIMES {
        return;
    }
    let Ok(plan) = run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest) else { return };
    let sum: f64 = plan.weights.iter().map(|weight| weight.weight).sum();
    assert!((sum - 1.0).abs() < 1e-6 && plan.relative_error >= 0.0, "{plan:?}");
    match run.load(&plan) {
        Ok(average) => check_average(&average, &plan.weights.iter().map(|w| w.weight.abs()).sum()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn default_metadata(step: u64) -> HashMap<String, String> {
    let text = [
        ("format", "pt".to_owned()),
        ("posthoc_ema", "1".to_owned()),
        ("profile", r#"{"kind":"power","gamma":6.94}"#.to_owned()),
        ("step", step.to_string()),
        ("history", format!("[[10,{step},10]]")),
    ];
    text.map(|(key, value)| (key.to_owned(), value)).into_iter().collect()
}

/// Checks that an average has the values that both snapshots share.
fn check_average(average: &Tensors, gain: &f64) {
    for (name, expected) in [("w", &[1.0f32, 0.5, 0.25][..]), ("b", &[2.0])] {
        let Some(tensor) = average.get(name) else { panic!("no tensor {name}") };
        // The metadata may name any dtype.
        let Some(values) = tensor.to_vec::<f32>() else { continue };
        for (value, expected) in values.iter().zip(expected) {
            let tolerance = 1e-6 * (1.0 + gain) * f64::from(expected.abs());
            assert!((f64::from(*value) - f64::from(*expected)).abs() <= tolerance, "{name}: {value}, not {expected}");
        }
    }
}

/// Checks that parsed profiles and histories survive a round trip through JSON.
fn check_values(text: &str) {
    for (_, value) in text.lines().filter_map(|line| line.split_once('=')) {
        if let Ok(profile) = serde_json::from_str::<Profile>(value) {
            let again = serde_json::to_string(&profile).unwrap();
            assert_eq!(serde_json::from_str::<Profile>(&again).unwrap(), profile, "{value}");
            let half = profile.cumulative(50.0, 100.0);
            let all = profile.cumulative(100.0, 100.0);
            assert!((0.0..=1.0).contains(&half) && all == 1.0, "{value}: {half}, {all}");
        }
        if let Ok(history) = serde_json::from_str::<History>(value) {
            let again = serde_json::to_string(&history).unwrap();
            assert_eq!(serde_json::from_str::<History>(&again).unwrap(), history, "{value}");
            assert_eq!(history.is_empty(), history.first().is_none());
        }
    }
}
