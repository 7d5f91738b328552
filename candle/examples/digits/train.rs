//! Training: rectified flow with Adam at a constant rate, which leaves the last weights noisy.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use rand::Rng;

use crate::data::{self, Batch, Digit};
use crate::model::Network;
use crate::progress;

/// Settings of a training.
pub struct Settings {
    /// Seeds the initial weights, the batches and their noise.
    pub seed: u64,
    pub steps: u64,
    /// Images in each step.
    pub batch: usize,
    pub learning_rate: f64,
}

impl Settings {
    pub fn new(seed: u64, steps: u64) -> Self {
        Self { seed, steps, batch: 64, learning_rate: 0.003 }
    }
}

/// Trains the network over `vars` and calls `on_step` after each step.
pub fn train(
    vars: &VarMap,
    network: &Network,
    digits: &[Digit],
    settings: &Settings,
    rng: &mut impl Rng,
    mut on_step: impl FnMut() -> Result<()>,
) -> Result<()> {
    let mut optimizer = AdamW::new(vars.all_vars(), adam(settings))?;
    let progress = progress::bar("training", settings.steps);
    for _ in 0..settings.steps {
        let batch = data::batch(&data::choose(digits, settings.batch, rng), rng)?;
        optimizer.backward_step(&loss(network, &batch)?)?;
        on_step()?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(())
}

/// Returns the settings of Adam: AdamW without weight decay.
fn adam(settings: &Settings) -> ParamsAdamW {
    ParamsAdamW { lr: settings.learning_rate, weight_decay: 0.0, ..ParamsAdamW::default() }
}

/// Returns the flow-matching loss: the mean squared error of the velocity over rows and pixels, a scalar.
pub fn loss(network: &Network, batch: &Batch) -> Result<Tensor> {
    let velocity = network.forward(&batch.x_t, &batch.t, &batch.class)?;
    Ok(candle_nn::loss::mse(&velocity, &batch.velocity)?)
}
