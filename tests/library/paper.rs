//! Errors of averages synthesized from a few dozen snapshots of two profiles.
//!
//! Karras et al. 2023 (arXiv:2312.02696, section 3.2) state that they are enough for nearly perfect averages of any
//! length.

use posthoc_ema::math::Schedule;
use posthoc_ema::{At, Forecast, Profile, Retention};

const STEPS: u64 = 96_000;

/// Returns the worst relative error over lengths from `first` to `last`.
///
/// Two profiles are tracked, with `snapshots` evenly spaced snapshots of each.
fn worst([first, last]: [f64; 2], tracked: [f64; 2], snapshots: usize) -> f64 {
    let forecast = Forecast {
        schedule: Schedule { checkpoint_every: STEPS / snapshots as u64, snapshot_growth: None, ..Schedule::default() },
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

/// Compares the default profiles with those of the paper, which do not cover long lengths.
#[test]
fn two_profiles_and_32_snapshots_have_errors_below_one_percent() {
    println!("snapshots  0.05 and 0.28  0.05 and 0.10, between  and up to 0.28");
    let mut previous = f64::INFINITY;
    for snapshots in [16, 24, 32, 48, 64] {
        let default = worst([0.05, 0.28], [0.05, 0.28], snapshots);
        let paper = worst([0.05, 0.10], [0.05, 0.10], snapshots);
        let paper_beyond = worst([0.05, 0.28], [0.05, 0.10], snapshots);
        println!("{snapshots:9}  {default:13.5}  {paper:22.5}  {paper_beyond:14.5}");
        assert!(paper < default && default < 0.1 * paper_beyond, "{snapshots}: {paper} {default} {paper_beyond}");
        assert!(default < previous, "{snapshots}: {default} is not below {previous}");
        assert!(snapshots < 32 || default < 0.01, "{snapshots}: {default}");
        previous = default;
    }
}
