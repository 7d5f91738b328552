//! Network: a residual multilayer perceptron that predicts the velocity of an image on its line from noise, given the
//! time and the digit to draw.

use std::collections::{BTreeMap, HashMap};
use std::f32::consts::PI;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Embedding, Linear, Module, VarBuilder, VarMap};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::data::{CLASSES, PIXELS};

const WIDTH: usize = 192;
const BLOCKS: usize = 3;
/// Frequencies of the time's features, each with a sine and a cosine.
const FREQUENCIES: usize = 8;

/// Velocity field `v(x_t, t, class)`.
pub struct Network {
    image: Linear,
    time: Linear,
    class: Embedding,
    blocks: Vec<Linear>,
    velocity: Linear,
}

impl Network {
    /// Makes the network of the parameters in `vars`; missing ones are created.
    pub fn new(vars: VarBuilder) -> Result<Self> {
        let blocks = (0..BLOCKS)
            .map(|i| candle_nn::linear(WIDTH, WIDTH, vars.pp(format!("blocks.{i}"))))
            .collect::<candle_core::Result<_>>()?;
        Ok(Self {
            image: candle_nn::linear(PIXELS, WIDTH, vars.pp("image"))?,
            time: candle_nn::linear_no_bias(2 * FREQUENCIES, WIDTH, vars.pp("time"))?,
            class: candle_nn::embedding(CLASSES, WIDTH, vars.pp("class"))?,
            blocks,
            velocity: candle_nn::linear(WIDTH, PIXELS, vars.pp("velocity"))?,
        })
    }

    /// Makes a network of fixed tensors, such as those of a safetensors file, to evaluate it.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Result<Self> {
        Self::new(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
    }

    /// Returns the velocity, `(rows, PIXELS)`, at `x_t`, `(rows, PIXELS)`, `t`, `(rows, 1)`, and `class`, `(rows,)`.
    pub fn forward(&self, x_t: &Tensor, t: &Tensor, class: &Tensor) -> Result<Tensor> {
        let time = self.time.forward(&time_features(t)?)?;
        let condition = (time + self.class.forward(class)?)?;
        let mut hidden = (self.image.forward(x_t)? + condition)?;
        for block in &self.blocks {
            hidden = (block.forward(&hidden)?.silu()? + hidden)?;
        }
        Ok(self.velocity.forward(&hidden)?)
    }
}

/// Returns `sin(k pi t)` and `cos(k pi t)` for k = 1 to `FREQUENCIES`.
fn time_features(t: &Tensor) -> Result<Tensor> {
    let frequencies = (1..=FREQUENCIES).map(|k| k as f32 * PI).collect::<Vec<_>>();
    let phase = t.broadcast_mul(&Tensor::new(frequencies, t.device())?)?;
    Ok(Tensor::cat(&[phase.sin()?, phase.cos()?], D::Minus1)?)
}

/// Returns the network of the last weights.
pub fn last(vars: &VarMap) -> Result<Network> {
    Network::from_tensors(tensors(vars)?.into_iter().collect())
}

/// Reads the network of a safetensors file.
pub fn read(path: &Path) -> Result<Network> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu);
    Network::from_tensors(tensors.with_context(|| format!("cannot read {}", path.display()))?)
}

/// Returns all weights, tensor after tensor in the order of their names.
pub fn flatten(vars: &VarMap) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for tensor in tensors(vars)?.values() {
        all.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(all)
}

/// Returns the tensors by name: the map's own order differs from run to run.
fn tensors(vars: &VarMap) -> Result<BTreeMap<String, Tensor>> {
    let data = vars.data().lock().ok().context("a thread panicked while it held the variables")?;
    Ok(data.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect())
}

/// Creates a network with seeded parameters. Candle's own initialisation cannot be seeded on the CPU.
///
/// Matrices are normal with variance 1 / columns, vectors are zero.
pub fn init(rng: &mut impl Rng) -> Result<(VarMap, Network)> {
    let mut vars = VarMap::new();
    let network = Network::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    for (name, tensor) in tensors(&vars)? {
        vars.set_one(&name, initial_value(tensor.dims(), rng)?)?;
    }
    Ok((vars, network))
}

fn initial_value(dims: &[usize], rng: &mut impl Rng) -> Result<Tensor> {
    let &[rows, columns] = dims else {
        return Ok(Tensor::zeros(dims, DType::F32, &Device::Cpu)?);
    };
    let deviation = (columns as f32).sqrt().recip();
    let values = (0..rows * columns).map(|_| deviation * rng.sample::<f32, _>(StandardNormal)).collect();
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}
