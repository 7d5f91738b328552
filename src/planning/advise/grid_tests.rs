//! Advice against the best of grids, in ten settings.
//!
//! The best of the fine grids is stored here. This command finds it again, in an hour:
//!
//! ```sh
//! cargo test --release -p posthoc-ema --lib advise::grid_tests::fine -- --ignored --nocapture
//! ```

use super::search::TrackingSetup;
use super::*;

/// The first of the settings: a small range and averages in f32.
fn long() -> AdviceRequest {
    AdviceRequest {
        steps: 500_000,
        update_every: 10,
        update_after_step: 0,
        snapshot_growth: Some(1.2),
        parameters: 300_000_000,
        dtype: Dtype::F32,
        disk: 60_000_000_000,
        range: (0.03, 0.15),
    }
}

/// The example of the documentation.
fn example() -> AdviceRequest {
    AdviceRequest {
        steps: 100_000,
        parameters: 1_000_000_000,
        dtype: Dtype::BF16,
        disk: 100_000_000_000,
        range: (0.05, 0.28),
        ..long()
    }
}

fn settings() -> [AdviceRequest; 10] {
    let half = AdviceRequest { dtype: Dtype::F16, ..example() };
    [
        long(),
        example(),
        AdviceRequest { steps: 95_000, ..example() },
        AdviceRequest { disk: 80_000_000_000, range: (0.05, 0.2), ..half.clone() },
        AdviceRequest { dtype: Dtype::F32, disk: 150_000_000_000, range: (0.1, 0.25), ..example() },
        AdviceRequest { steps: 20_000, disk: 90_000_000_000, ..half.clone() },
        AdviceRequest { steps: 3000, disk: 70_000_000_000, ..example() },
        AdviceRequest { steps: 1_000_000, update_every: 100, disk: 45_000_000_000, range: (0.02, 0.1), ..long() },
        AdviceRequest {
            steps: 200_000,
            update_after_step: 20_000,
            disk: 90_000_000_000,
            range: (0.08, 0.28),
            ..half.clone()
        },
        AdviceRequest { snapshot_growth: None, disk: 120_000_000_000, range: (0.03, 0.28), ..half },
    ]
}

/// Grid of lengths, by their ratio, and of the number of snapshots.
struct Grid {
    ratio: f64,
    snapshots_ratio: f64,
}

impl Grid {
    /// Returns the choices of a search: intervals, and increasing lengths of which the first and the last are near the
    /// ends of the range.
    fn candidates(&self, search: &Search) -> Vec<(Vec<f64>, u64)> {
        let (from, to) = search.request.range;
        let count = ((to / from).ln() / self.ratio.ln()).round().max(1.0);
        let ratio = (to / from).powf(1.0 / count);
        let last = count as i32 + 1;
        let length = |i: i32| (from * ratio.powi(i)).min(0.2885);
        let near = (1.7f64.ln() / ratio.ln()).ceil() as i32;
        let mut all: Vec<Vec<i32>> = (0..=near.min(last)).map(|i| vec![i]).collect();
        for _ in 1..search.profiles {
            all = all
                .iter()
                .flat_map(|some| (some[some.len() - 1] + 1..=last).map(|i| [&some[..], &[i]].concat()))
                .collect();
        }
        all.retain(|indices| indices[indices.len() - 1] >= last - 1 - near / 2);
        let mut intervals = Vec::new();
        let mut snapshots = 0.8 * search.keep as f64;
        while snapshots < 5.0 * search.keep as f64 {
            intervals.push(search.interval(snapshots as u64));
            snapshots *= self.snapshots_ratio;
        }
        intervals.dedup();
        let lengths: Vec<Vec<f64>> = all.iter().map(|indices| indices.iter().map(|&i| length(i)).collect()).collect();
        lengths.iter().flat_map(|some| intervals.iter().map(|&every| (some.clone(), every))).collect()
    }

    /// Returns the best choice for the whole disk, its error, and the number of choices.
    fn best(&self, search: &Search) -> (Option<Advice>, usize) {
        let all = self.candidates(search);
        let judge = |(lengths, every): &(Vec<f64>, u64)| search.judge(lengths.clone(), *every);
        let best: Option<TrackingSetup> = all.par_iter().map(judge).min_by(|a, b| a.error.total_cmp(&b.error));
        (search.exact(best.into_iter().collect()).unwrap(), all.len())
    }
}

fn search(request: &AdviceRequest, profiles: usize) -> Search<'_> {
    Search::new(request, profiles, request.kept(profiles as u64, request.disk)).unwrap()
}

fn advised(request: &AdviceRequest, profiles: usize) -> Advice {
    search(request, profiles).best(&|| ()).unwrap().unwrap()
}

fn described(advice: &Advice) -> String {
    let lengths: Vec<String> = advice.forecast.tracked.iter().map(Profile::to_string).collect();
    let Forecast { schedule, keep, .. } = &advice.forecast;
    format!("{:.6} of {} every {}, {keep} kept", advice.worst.error, lengths.join(", "), schedule.checkpoint_every)
}

/// Smallest errors of fine grids of two, three and four profiles, for each of the settings.
const BEST: [[f64; 3]; 10] = [
    [0.001_338, 0.000_182, 0.000_051],
    [0.009_156, 0.006_159, 0.005_084],
    [0.009_488, 0.006_315, 0.004_949],
    [0.003_119, 0.001_511, 0.001_316],
    [0.002_304, 0.000_361, 0.000_140],
    [0.009_637, 0.004_257, 0.004_509],
    [0.020_097, 0.019_512, 0.044_768],
    [0.002_924, 0.000_471, 0.000_163],
    [0.010_473, 0.004_087, 0.002_033],
    [0.007_985, 0.004_589, 0.003_669],
];

#[test]
#[ignore = "an hour"]
fn fine_grids_are_searched() {
    for (setting, request) in settings().iter().enumerate() {
        for (profiles, ratio, snapshots_ratio) in [(2, 1.06, 1.1), (3, 1.12, 1.12), (4, 1.18, 1.15)] {
            let (best, count) = Grid { ratio, snapshots_ratio }.best(&search(request, profiles));
            println!("{setting}, {profiles} profiles, {count} choices: {}", described(&best.unwrap()));
        }
    }
}

#[test]
fn advice_is_within_five_percent_of_fine_grids() {
    for (setting, (request, best)) in settings().iter().zip(BEST).enumerate() {
        for (profiles, best) in (2..=4).zip(best) {
            let start = std::time::Instant::now();
            let advice = advised(request, profiles);
            println!("{setting}, {profiles} profiles, {:.1} s: {}", start.elapsed().as_secs_f64(), described(&advice));
            assert!(advice.worst.error <= 1.05 * best, "{setting}: {best} is possible, not {}", described(&advice));
        }
    }
}

/// Choices that were found by hand, with the worst error of each.
#[test]
fn advice_is_as_good_as_choices_by_hand() {
    let error = |request: AdviceRequest, profiles| advised(&request, profiles).worst.error;
    // (0.039, 0.1425) every 5,950 steps, (0.033, 0.087, 0.1425) every 13,880, and (0.03, 0.051, 0.088, 0.1425) every
    // 15,625.
    for (profiles, by_hand) in [(2, 0.00134), (3, 0.00021), (4, 0.00008)] {
        let advised = error(long(), profiles);
        assert!(advised <= by_hand, "{profiles} profiles: {advised}");
    }
    // (0.055, 0.118, 0.28) every 3,700 steps, and the best of four.
    for (profiles, by_hand) in [(3, 0.0068), (4, 0.0065)] {
        let advised = error(example(), profiles);
        assert!(advised <= by_hand, "{profiles} profiles: {advised}");
    }
}

#[test]
fn advice_beats_grids_of_small_settings() {
    let small = AdviceRequest { steps: 5000, disk: 60_000_000_000, ..example() };
    for request in [small.clone(), AdviceRequest { snapshot_growth: None, range: (0.08, 0.25), ..small }] {
        for profiles in [2, 3] {
            let search = search(&request, profiles);
            let (best, count) = Grid { ratio: 1.15, snapshots_ratio: 1.25 }.best(&search);
            assert!(count > 50, "{count}");
            let (best, advice) = (best.unwrap(), advised(&request, profiles));
            let (by_grid, by_search) = (described(&best), described(&advice));
            assert!(advice.worst.error <= 1.02 * best.worst.error, "{by_search} is worse than {by_grid}");
        }
    }
}
