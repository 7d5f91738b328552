//! Tracking during the training: the run to synthesize from, and averages and moments to compare syntheses with.

use std::iter::zip;

use anyhow::Result;
use candle_nn::VarMap;
use posthoc_ema::{PostHocEma, Tensors, UpdateOutcome};
use posthoc_ema_candle::Variables;

use crate::folder::Folder;
use crate::model;

/// Steps between updates of the averages.
const UPDATE_EVERY: u64 = 10;
/// Snapshots of each average during a training of any length.
const SNAPSHOTS: u64 = 20;
/// Lengths that are stored, from which all others are synthesized.
const STORED: [f64; 2] = [0.05, 0.28];
/// Lengths that are tracked directly, to compare with synthesized ones.
const DIRECT: [f64; 3] = [0.10, 0.15, 0.20];

/// Running averages of a training.
pub struct Trackers {
    run: PostHocEma,
    direct: PostHocEma,
    trajectory: Trajectory,
}

/// Results of a training to compare syntheses with.
pub struct Tracked {
    /// Averages over the same updates that were tracked directly, each with its sigma_rel.
    pub direct: Vec<(f64, Tensors)>,
    pub trajectory: Trajectory,
}

impl Trackers {
    pub fn create(folder: &Folder, steps: u64, vars: &VarMap) -> Result<Self> {
        let every = (steps / SNAPSHOTS).next_multiple_of(UPDATE_EVERY);
        let run = PostHocEma::options(folder.run())
            .sigma_rels(STORED)
            .update_every(UPDATE_EVERY)
            .checkpoint_every(every)
            // Evenly spaced snapshots alone: this training is long enough for them.
            .snapshot_growth(None)
            // One more for the end of a training that no interval divides.
            .max_checkpoints(SNAPSHOTS as usize + 1)
            .create(&Variables(vars))?;
        let direct = PostHocEma::options(folder.direct())
            .sigma_rels(DIRECT)
            .update_every(UPDATE_EVERY)
            // No snapshot is due before the end; `finish` stores one.
            .checkpoint_every(steps.next_multiple_of(UPDATE_EVERY) + UPDATE_EVERY)
            .snapshot_growth(None)
            .create(&Variables(vars))?;
        Ok(Self { run, direct, trajectory: Trajectory::default() })
    }

    /// Updates all averages; to be called after each step of training.
    pub fn update(&mut self, vars: &VarMap) -> Result<()> {
        let outcome = self.run.update(&Variables(vars))?;
        self.direct.update(&Variables(vars))?;
        if outcome != UpdateOutcome::Skipped {
            self.trajectory.add(self.run.step(), vars)?;
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<Tracked> {
        let profiles = self.direct.profiles().iter();
        let direct = zip(DIRECT, profiles)
            .map(|(sigma_rel, profile)| Ok((sigma_rel, self.direct.synthesize(profile.clone())?)))
            .collect::<Result<_>>()?;
        self.run.finish()?;
        self.direct.finish()?;
        Ok(Tracked { direct, trajectory: self.trajectory })
    }
}

/// Moments of each weight over the updates, which bound the error of a synthesis.
#[derive(Default)]
pub struct Trajectory {
    /// Times of the updates.
    pub times: Vec<u64>,
    weights: Vec<Movement>,
}

#[derive(Clone, Copy, Default)]
struct Movement {
    /// First value. Distances from it lose fewer digits in the sums than the values.
    origin: f64,
    /// Sum of distances, each times the steps since the update before.
    sum: f64,
    /// Sum of squared distances, each times the steps since the update before.
    squares: f64,
    /// Largest magnitude.
    largest: f64,
}

impl Movement {
    fn starting_at(weight: f32) -> Self {
        Self { origin: f64::from(weight), ..Self::default() }
    }
}

impl Trajectory {
    /// Adds the weights of an update at `time`.
    fn add(&mut self, time: u64, vars: &VarMap) -> Result<()> {
        let weights = model::flatten(vars)?;
        if self.weights.is_empty() {
            self.weights = weights.iter().map(|&weight| Movement::starting_at(weight)).collect();
        }
        let interval = (time - self.times.last().unwrap_or(&0)) as f64;
        for (movement, weight) in zip(&mut self.weights, weights) {
            let distance = f64::from(weight) - movement.origin;
            movement.sum += interval * distance;
            movement.squares += interval * distance * distance;
            movement.largest = movement.largest.max(f64::from(weight.abs()));
        }
        self.times.push(time);
        Ok(())
    }

    /// Returns `sqrt(sum_k delta_k (p_k - c)^2)` of each weight: `delta_k` steps since the update before, `c` the mean.
    pub fn norms(&self) -> Vec<f64> {
        let steps = self.times.last().copied().unwrap_or(1) as f64;
        self.weights.iter().map(|m| (m.squares - m.sum * m.sum / steps).max(0.0).sqrt()).collect()
    }

    /// Returns the largest magnitude of each weight so far.
    pub fn largest(&self) -> impl Iterator<Item = f64> {
        self.weights.iter().map(|movement| movement.largest)
    }
}
