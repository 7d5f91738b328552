//! The paper's statement that averages of two profiles, stored a few dozen times, are enough to synthesize any length
//! nearly perfectly (Karras et al. 2023, arXiv:2312.02696, section 3.2), in figures.

use posthoc_ema::math::Schedule;
use posthoc_ema::{At, Forecast, Profile, Retention};

const STEPS: u64 = 96_000;

/// The worst relative error over lengths from `first` to `last`, for two profiles and `snapshots` evenly spaced ones of
/// each.
fn worst([first, last]: [f64; 2], tracked: [f64; 2], snapshots: usize) -> f64 {
    let forecast = Forecast {
        schedule: Schedule { checkpoint_every: STEPS / snapshots as u64, ..Schedule::default() },
        steps: STEPS,
        keep: snapshots,
        retention: Retention::Latest,
        tracked: tracked.map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap()).to_vec(),
    };
    let length = |i: u32| first + (last - first) * f64::from(i) / 200.0;
    let lengths: Vec<Profile> = (0..=200).map(|i| Profile::sigma_rel(length(i)).unwrap()).collect();
    let plans = forecast.plans(&lengths, At::Latest).unwrap();
    plans.iter().map(|plan| plan.relative_error).max_by(f64::total_cmp).unwrap()
}

/// The two profiles that are tracked by default, and those of the paper, whose longest lengths lie far outside.
#[test]
fn two_profiles_and_a_few_dozen_snapshots_reach_every_length() {
    let ours = |snapshots| worst([0.05, 0.28], [0.05, 0.28], snapshots);
    let between = |snapshots| worst([0.05, 0.10], [0.05, 0.10], snapshots);
    let beyond = |snapshots| worst([0.05, 0.28], [0.05, 0.10], snapshots);
    println!("snapshots  0.05 and 0.28  0.05 and 0.10, between  and up to 0.28");
    let rows =
        [16, 24, 32, 48, 64].map(|snapshots| (snapshots, ours(snapshots), between(snapshots), beyond(snapshots)));
    for (snapshots, ours, between, beyond) in rows {
        println!("{snapshots:9}  {ours:13.5}  {between:22.5}  {beyond:14.5}");
        assert!(between < ours && ours < 0.1 * beyond, "{rows:?}");
    }
    // More snapshots help, and 32 of each are within one percent of every length.
    assert!(rows.windows(2).all(|pair| pair[1].1 < pair[0].1) && rows[2].1 < 0.01, "{rows:?}");
}
