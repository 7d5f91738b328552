//! Advice against plans, exhaustive searches and invalid requests.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::planning::At;

fn request(disk: u64, range: (f64, f64)) -> AdviceRequest {
    AdviceRequest {
        steps: 100_000,
        update_every: 10,
        update_after_step: 0,
        snapshot_growth: Some(1.2),
        parameters: 1_000_000,
        dtype: Dtype::F16,
        disk,
        range,
    }
}

fn worst(forecast: &Forecast, range: (f64, f64)) -> f64 {
    let length = |i: u32| range.0 + (range.1 - range.0) * f64::from(i) / 50.0;
    let targets: Vec<Profile> = (0..=50).map(|i| Profile::sigma_rel(length(i).min(range.1)).unwrap()).collect();
    forecast.plans(&targets, At::Latest).unwrap().iter().map(|plan| plan.relative_error).fold(0.0, f64::max)
}

#[test]
fn advice_fits_the_disk_and_beats_the_defaults() {
    let range = (0.05, 0.28);
    // Twenty steps of two profiles, one more while it is written, and the live state twice.
    let disk = 2 * 1_000_000 * (21 * 2 + 2 * 6);
    let request = request(disk, range);
    let parts = AtomicUsize::new(0);
    let all = advise(&request, &|all| {
        assert_eq!(all, ADVICE_PARTS);
        parts.fetch_add(1, Ordering::Relaxed);
    });
    let all = all.unwrap();
    assert_eq!(parts.into_inner(), ADVICE_PARTS);
    assert_eq!(all.iter().map(|advice| advice.forecast.tracked.len()).collect::<Vec<_>>(), [2, 2, 2, 3, 3, 3, 4, 4]);
    // Half of the disk does not hold a step of four profiles.
    for (advice, share) in all.iter().zip([0.5, 1.0, 2.0, 0.5, 1.0, 2.0, 1.0, 2.0]) {
        let forecast = &advice.forecast;
        assert!(advice.disk as f64 <= share * disk as f64, "{advice:?}");
        assert_eq!(advice.disk, forecast.disk(1_000_000, Dtype::F16));
        assert!(worst(forecast, range) <= 1.1 * advice.worst.relative_error, "{advice:?}");
    }
    assert_eq!(all[1].forecast.keep, 20);
    let evenly = Forecast { keep: 20, ..request.forecast(default(), 1000, 20) };
    assert!(all[1].worst.relative_error <= worst(&evenly, range), "{:?}", all[1]);
    let newest = Forecast { retention: Retention::Latest, ..evenly };
    assert!(all[1].worst.error < 0.1 * worst(&newest, range));
    // Rounding to f16 is not the main part of the error.
    assert!(all.iter().all(|advice| advice.worst.noise_gain * 2.0e-4 <= advice.worst.error), "{all:?}");
    // More disk is better, and so are three profiles here.
    let error = |i: usize| all[i].worst.error;
    assert!(error(2) < error(1) && error(1) < error(0) && error(4) < error(1), "{all:?}");
}

/// Compares with trainings that end at each snapshot of the last tenth, and at the one before.
#[test]
fn advised_error_is_the_largest_of_the_last_tenth() {
    let request = AdviceRequest { dtype: Dtype::F32, ..request(2 * 1_000_000 * (13 * 4 + 2 * 6), (0.05, 0.28)) };
    for profiles in [2, 3] {
        let keep = request.kept(profiles, request.disk);
        let advice = Search::new(&request, profiles as usize, keep).unwrap().best(&|| ()).unwrap().unwrap();
        let snapshots = advice.forecast.schedule.snapshots(request.steps);
        let late = snapshots.partition_point(|&step| step <= 90_000) - 1;
        assert!(snapshots.len() - late > 1, "{snapshots:?}");
        let ends = snapshots[late..].iter().map(|&steps| Forecast { steps, ..advice.forecast.clone() });
        let largest = ends.map(|forecast| worst(&forecast, request.range)).fold(0.0, f64::max);
        assert!((largest / advice.worst.relative_error - 1.0).abs() < 0.03, "{largest}: {advice:?}");
    }
}

fn default() -> Vec<Profile> {
    [0.05, 0.28].map(|length| Profile::sigma_rel(length).unwrap()).to_vec()
}

#[test]
fn small_disk_and_invalid_settings_are_an_error() {
    let error = |request: AdviceRequest| advise(&request, &|_| ()).unwrap_err().to_string();
    let text = error(request(1_000_000, (0.05, 0.28)));
    assert!(text.contains("1000000 bytes do not hold one step's") && text.contains("32000000 bytes"), "{text}");
    assert!(error(request(1 << 30, (0.2, 0.1))).contains("the shorter sigma_rel first"));
    let never = AdviceRequest { update_every: 0, ..request(1 << 30, (0.1, 0.2)) };
    assert!(error(never).contains("update_every"));
}

#[test]
fn short_training_is_stored_at_each_update() {
    let short = AdviceRequest { steps: 50, ..request(1 << 40, (0.1, 0.2)) };
    let advice = advise(&short, &|_| ()).unwrap();
    assert!(advice.iter().all(|advice| advice.forecast.keep == 5 && advice.forecast.schedule.checkpoint_every == 10));
}
