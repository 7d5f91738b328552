//! Oscillations, which a few smooth variances cannot describe.

use std::f64::consts::TAU;

use super::super::gram::at_marks;
use super::super::solve::Updates;
use super::cells::Cells;

/// Most harmonics of the spacing of snapshots. Movement of such a period looks alike at each snapshot.
const HARMONICS: usize = 3;

/// Number of spacings over which an oscillation keeps its phase.
const MEMORY: usize = 6;

/// Number of frequencies of oscillations that forget their phase: up to two periods a spacing.
const FREQUENCIES: usize = 4 * MEMORY;

/// Longest spacing of snapshots, as a part of the time, that oscillations are fitted at.
const LARGEST_PARTS: f64 = 24.0;

/// Values on the cells whose products with a weight's shares are the responses to one kind of oscillation.
pub(super) struct Wave {
    pub values: Vec<Vec<f64>>,
}

/// Returns the kinds of oscillation for snapshots at `marks`.
pub(super) fn waves(updates: &Updates, cells: &Cells, marks: &[usize]) -> Vec<Wave> {
    let newest = updates.times.last().map_or(1.0, |&time| time as f64);
    let spacing = spacing(updates, marks).max(newest / LARGEST_PARTS);
    let harmonics = (1..=HARMONICS).map(|harmonic| {
        let frequency = harmonic as f64 / spacing;
        let (cos, sin) = oscillation(updates, cells, frequency);
        Wave { values: vec![cos, sin] }
    });
    let reach = MEMORY as f64 * spacing;
    let forgetful = (1..=FREQUENCIES).filter(|j| !j.is_multiple_of(2 * MEMORY)).map(|j| {
        let frequency = j as f64 / (2.0 * reach);
        let (cos, sin) = oscillation(updates, cells, frequency);
        let windows = 0..=(newest / reach).ceil() as usize;
        let values = windows.flat_map(|i| {
            let share = |time: &f64| (1.0 - (time - i as f64 * reach).abs() / reach).max(0.0).sqrt();
            let windowed =
                |wave: &Vec<f64>| cells.times.iter().zip(wave).map(|(time, value)| share(time) * value).collect();
            [windowed(&cos), windowed(&sin)]
        });
        Wave { values: values.collect() }
    });
    harmonics.chain(forgetful).collect()
}

/// Returns the smallest distance of snapshots in the later half of the time.
fn spacing(updates: &Updates, marks: &[usize]) -> f64 {
    let newest = updates.times.last().map_or(1.0, |&time| time as f64);
    let times: Vec<f64> = marks.iter().map(|&mark| updates.times[mark] as f64).collect();
    let late = times.windows(2).filter(|pair| pair[1] > 0.5 * newest).map(|pair| pair[1] - pair[0]);
    let least = late.fold(f64::INFINITY, f64::min);
    if least.is_finite() { least } else { newest }
}

/// Returns the means over each cell of cosine and sine of a frequency, in periods per step.
fn oscillation(updates: &Updates, cells: &Cells, frequency: f64) -> (Vec<f64>, Vec<f64>) {
    let angle = |time: &u64| TAU * ((frequency * *time as f64) % 1.0);
    let mean = |of: fn(f64) -> f64| {
        let values = |cell: &[usize]| updates.times[cell[0]..cell[1]].iter().map(|time| of(angle(time))).sum::<f64>();
        cells.bounds.windows(2).map(|cell| values(cell) / (cell[1] - cell[0]) as f64).collect()
    };
    (mean(f64::cos), mean(f64::sin))
}

/// Returns the response of each chain at each mark to parameters that alternate from update to update.
pub(super) fn alternating_at_marks(updates: &Updates, marks: &[usize]) -> Vec<Vec<f64>> {
    let signs = signs(&updates.counts);
    let of_chain = |decays: &super::super::chain::Decays| {
        let mut response = 0.0;
        at_marks(marks, |k| {
            response = decays.beta[k] * response + decays.one_minus_beta[k] * signs[k];
            response
        })
    };
    updates.decays.iter().map(of_chain).collect()
}

/// Returns the response of weights on the updates.
pub(super) fn alternating(updates: &Updates, weights: &[f64]) -> f64 {
    signs(&updates.counts).iter().zip(weights).map(|(sign, weight)| sign * weight).sum()
}

/// Returns alternating signs of the updates, and 0 at times without an update.
fn signs(counts: &[f64]) -> Vec<f64> {
    let mut next = 1.0;
    let sign = |count: &f64| {
        if !(*count > 0.0) {
            return 0.0;
        }
        next = -next;
        -next
    };
    counts.iter().map(sign).collect()
}
