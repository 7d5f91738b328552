//! What is kept while the network trains: the run to synthesize from, and what its syntheses are compared with.

use std::iter::zip;

use anyhow::Result;
use candle_nn::VarMap;
use posthoc_ema::{PostHocEma, Tensors, UpdateOutcome};
use posthoc_ema_candle::Variables;

use crate::folder::Folder;
use crate::model;

/// Steps between updates of the averages.
const UPDATE_EVERY: u64 = 10;
/// Snapshots of each average during a training, however long it is.
const SNAPSHOTS: u64 = 20;
/// The lengths that are stored, and from which all others are made.
const STORED: [f64; 2] = [0.05, 0.28];
/// The lengths tracked a second time, to compare with what is made from the stored ones.
const DIRECT: [f64; 3] = [0.10, 0.15, 0.20];

/// The running averages of a training.
pub struct Trackers {
    run: PostHocEma,
    direct: PostHocEma,
    trajectory: Trajectory,
}

/// What a training has left behind to compare syntheses with.
pub struct Tracked {
    /// Average over the same updates, none of them by synthesis, with its sigma_rel.
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
            // One more, for the end of a training that is no multiple of the interval.
            .max_checkpoints(SNAPSHOTS as usize + 1)
            .create(&Variables(vars))?;
        let direct = PostHocEma::options(folder.direct())
            .sigma_rels(DIRECT)
            .update_every(UPDATE_EVERY)
            // Beyond the end: one snapshot of each, when the training is over.
            .checkpoint_every(steps.next_multiple_of(UPDATE_EVERY) + UPDATE_EVERY)
            .create(&Variables(vars))?;
        Ok(Self { run, direct, trajectory: Trajectory::default() })
    }

    /// To be called after each step of training.
    pub fn update(&mut self, vars: &VarMap) -> Result<()> {
        let step = self.run.update(&Variables(vars))?;
        self.direct.update(&Variables(vars))?;
        if step != UpdateOutcome::Skipped {
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

/// How each weight has moved over the updates: as much of it as the error of a synthesis is bounded by.
#[derive(Default)]
pub struct Trajectory {
    /// The updates' times.
    pub times: Vec<u64>,
    weights: Vec<Movement>,
}

#[derive(Clone, Copy, Default)]
struct Movement {
    /// The first value; sums are of the distances from it, which keeps their digits.
    origin: f64,
    /// The steps between updates, times the distance.
    sum: f64,
    /// The steps between updates, times the distance squared.
    squares: f64,
    /// The greatest magnitude.
    largest: f64,
}

impl Trajectory {
    /// Adds the weights, in order of name, of an update at `time`.
    fn add(&mut self, time: u64, vars: &VarMap) -> Result<()> {
        let weights = model::flatten(vars)?;
        if self.weights.is_empty() {
            let at = |&weight: &f32| Movement { origin: f64::from(weight), ..Movement::default() };
            self.weights = weights.iter().map(at).collect();
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

    /// For each weight `sqrt(sum_k delta_k (p_k - c)^2)`, with `delta_k` the steps since the update before and `c`
    /// the mean over all steps.
    pub fn norms(&self) -> Vec<f64> {
        let steps = self.times.last().copied().unwrap_or(1) as f64;
        self.weights.iter().map(|m| (m.squares - m.sum * m.sum / steps).max(0.0).sqrt()).collect()
    }

    /// The greatest magnitude that each weight has had.
    pub fn largest(&self) -> impl Iterator<Item = f64> {
        self.weights.iter().map(|movement| movement.largest)
    }
}
