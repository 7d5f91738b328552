//! Evaluation of weights: their loss on held-out images, and the digits that they draw.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use posthoc_ema::Plan;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::data::{self, Batch, Digit, PIXELS};
use crate::model::{self, Network};
use crate::{progress, train};

/// A synthesized average in a file, with the predictions of its plan.
pub struct Average {
    pub sigma_rel: f64,
    /// Relative error of the profile, see [`Plan`].
    pub predicted_error: f64,
    pub noise_gain: f64,
    pub path: PathBuf,
}

impl Average {
    pub fn new(sigma_rel: f64, plan: &Plan, path: PathBuf) -> Self {
        Self { sigma_rel, predicted_error: plan.relative_error, noise_gain: plan.noise_gain, path }
    }
}

/// Losses of the averages and of the last weights.
pub struct Losses {
    /// Averages with their losses, by rising sigma_rel.
    pub averages: Vec<(Average, f64)>,
    /// Loss of the last weights.
    pub last: f64,
}

impl Losses {
    /// Returns the average with the smallest loss, and that loss; `None` without averages.
    pub fn best(&self) -> Option<&(Average, f64)> {
        self.averages.iter().min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Evaluates the averages, each read from its file, and the last weights.
pub fn losses(held_out: &HeldOut, vars: &VarMap, averages: Vec<Average>) -> Result<Losses> {
    let progress = progress::bar("evaluating", averages.len() as u64);
    let last = held_out.loss(&model::last(vars)?)?;
    let mut evaluated = Vec::with_capacity(averages.len());
    for average in averages {
        let loss = held_out.loss(&model::read(&average.path)?)?;
        evaluated.push((average, loss));
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(Losses { averages: evaluated, last })
}

/// Held-out images with noise and times drawn once, so that all weights are evaluated on the same draws.
pub struct HeldOut {
    /// Each batch holds every image once, so that their mean losses have equal weight.
    batches: Vec<Batch>,
}

impl HeldOut {
    /// Makes `draws` draws of noise and time for each image.
    pub fn new(digits: &[Digit], draws: u64, seed: u64) -> Result<Self> {
        ensure!(draws > 0, "draws = 0: a loss needs at least one draw of noise and time");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let digits = digits.iter().collect::<Vec<_>>();
        let batches = (0..draws).map(|_| data::batch(&digits, &mut rng)).collect::<Result<_>>()?;
        Ok(Self { batches })
    }

    /// Returns the flow-matching loss, mean over images and draws.
    pub fn loss(&self, network: &Network) -> Result<f64> {
        let mut sum = 0.0;
        for batch in &self.batches {
            sum += f64::from(train::loss(network, batch)?.to_scalar::<f32>()?);
        }
        Ok(sum / self.batches.len() as f64)
    }
}

/// Draws the noise from which samples start, `(rows, PIXELS)`.
pub fn noise(rows: usize, seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..rows * PIXELS).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
    Ok(Tensor::from_vec(values, (rows, PIXELS), &Device::Cpu)?)
}

/// Draws one digit for each entry of `class`: integrates the velocity from `noise` at t = 0 to t = 1 in `steps` steps
/// of Heun's method. Returns the pixels of each, -1 for paper and 1 for ink.
pub fn sample(network: &Network, noise: &Tensor, class: &[u32], steps: usize) -> Result<Vec<Vec<f32>>> {
    let class = Tensor::new(class, &Device::Cpu)?;
    let mut x = noise.clone();
    for step in 0..steps {
        let t = step as f64 / steps as f64;
        x = heun_step(network, &x, t, 1.0 / steps as f64, &class)?;
    }
    Ok(x.to_vec2()?)
}

/// Computes `x + dt (v(x, t) + v(x + dt v(x, t), t + dt)) / 2`.
fn heun_step(network: &Network, x: &Tensor, t: f64, dt: f64, class: &Tensor) -> Result<Tensor> {
    let start = velocity(network, x, t, class)?;
    let euler = (x + (&start * dt)?)?;
    let end = velocity(network, &euler, t + dt, class)?;
    Ok((x + ((start + end)? * (dt / 2.0))?)?)
}

fn velocity(network: &Network, x: &Tensor, t: f64, class: &Tensor) -> Result<Tensor> {
    let t = Tensor::full(t as f32, (x.dim(0)?, 1), x.device())?;
    network.forward(x, &t, class)
}
