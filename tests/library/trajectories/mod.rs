//! Simulated trainings with known exact averages, and snapshots as they are stored.

pub mod kinds;

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use posthoc_ema::math::Chain;
use posthoc_ema::{Dtype, Profile};
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;

/// Elements of the one tensor.
pub const ELEMENTS: usize = 2048;

pub const STEPS: u64 = 20_000;
const CHECKPOINT_EVERY: u64 = 1000;

/// Movement of parameters. Sizes are relative to the weights, over the whole training.
#[derive(Clone, Copy, Debug)]
pub struct Movement {
    pub name: &'static str,
    /// Size of the movement along a straight line.
    pub ramp: f64,
    /// Size of the movement along a power of time.
    pub bent: f64,
    /// Exponent of `bent`: below 1 it is fast at first, above 1 at last.
    pub power: f64,
    /// Size of a random walk.
    pub walk: f64,
    /// Time constant of the walk's decay, in steps.
    pub memory: f64,
    /// Size of the independent noise of each update.
    pub white: f64,
    /// Amplitude of an oscillation.
    pub swing: f64,
    /// Period of the oscillation in steps.
    pub period: f64,
    /// True if walk and noise fall to 0 at the end, as with a learning rate that falls to 0.
    pub cooling: bool,
}

impl Movement {
    /// Returns true if it is a stationary sum of a straight line, a walk and white noise, as the error model assumes.
    pub fn is_modelled(&self) -> bool {
        self.bent == 0.0 && self.swing == 0.0 && self.memory.is_infinite() && !self.cooling
    }

    /// Returns true if it is small relative to the rounding of 16 bits.
    pub fn is_slow(&self) -> bool {
        [self.ramp, self.bent, self.walk, self.white, 10.0 * self.swing].iter().all(|&part| part <= 0.01)
    }

    /// Returns parameters that do not move.
    pub fn still() -> Movement {
        Movement {
            name: "still",
            ramp: 0.0,
            bent: 0.0,
            power: 0.5,
            walk: 0.0,
            memory: f64::INFINITY,
            white: 0.0,
            swing: 0.0,
            period: 1.0,
            cooling: false,
        }
    }

    /// Returns mixtures, each kind alone, and movements below the rounding of 16 bits.
    pub fn all() -> Vec<Movement> {
        let of =
            |name, [ramp, bent, walk, white]: [f64; 4]| Movement { name, ramp, bent, walk, white, ..Movement::still() };
        let swing = |name, swing, period| Movement { swing, period, ..of(name, [0.0; 4]) };
        vec![
            of("mixed", [0.5, 0.0, 0.3, 0.05]),
            of("mixed, noisy", [0.02, 0.0, 0.02, 0.1]),
            of("mixed, slow", [1e-3, 0.0, 3e-4, 1e-4]),
            of("ramp", [1.0, 0.0, 0.0, 0.0]),
            of("ramp, slow", [0.01, 0.0, 0.0, 0.0]),
            of("ramp, below an ulp", [2e-4, 0.0, 0.0, 0.0]),
            of("square root", [0.0, 1.0, 0.0, 0.0]),
            of("square root, slow", [0.0, 0.01, 0.0, 0.0]),
            of("walk", [0.0, 0.0, 0.5, 0.0]),
            of("walk, slow", [0.0, 0.0, 5e-3, 0.0]),
            of("walk, below an ulp", [0.0, 0.0, 2e-4, 0.0]),
            of("white", [0.0, 0.0, 0.0, 0.1]),
            of("white, faint", [0.0, 0.0, 0.0, 1e-3]),
            Movement { power: 4.0, ..of("late", [0.0, 0.5, 0.0, 0.0]) },
            Movement { power: 4.0, ..of("late, slow", [0.0, 5e-3, 1e-4, 0.0]) },
            Movement { memory: 500.0, ..of("forgetful walk", [0.02, 0.0, 0.1, 0.0]) },
            Movement { memory: 500.0, ..of("forgetful walk, slow", [1e-3, 0.0, 1e-2, 0.0]) },
            Movement { cooling: true, ..of("cooling", [0.1, 0.0, 0.3, 0.05]) },
            Movement { cooling: true, ..of("cooling, slow", [1e-3, 0.0, 0.01, 1e-3]) },
            swing("swing of half a snapshot", 0.01, 500.0),
            swing("swing of a snapshot", 0.01, 1000.0),
            swing("swing of a snapshot and a half", 0.02, 1500.0),
            swing("wide swing of a snapshot", 0.2, 1000.0),
            swing("swing of three snapshots", 0.03, 3100.0),
        ]
    }
}

/// Decays that the averages are tracked with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Chains {
    /// Exact decays.
    Tracked,
    /// One step's decay every ten steps, as in `tests/data/plans.json`, entry `foreign`.
    Counter,
}

impl Chains {
    fn chain(self, profile: &Profile) -> Chain {
        match self {
            Chains::Tracked => Chain::Tracked(profile.clone()),
            Chains::Counter => Chain::Counter { gamma: profile.as_gamma().unwrap(), stride: 10, offset: 2 },
        }
    }

    fn times(self) -> Vec<u64> {
        let first = if self == Chains::Tracked { 10 } else { 100 };
        (first..=STEPS).step_by(10).collect()
    }

    fn history(self, until: u64) -> String {
        let first = self.times()[0];
        match self {
            Chains::Tracked => format!("[[{first},{until},10]]"),
            Chains::Counter => {
                format!(r#"{{"updates":[[{first},{until},10]],"decay":{{"kind":"counter","stride":10,"offset":2}}}}"#)
            }
        }
    }
}

/// A simulated training.
pub struct Training {
    chains: Chains,
    profiles: [Profile; 2],
    /// Index of the profile, step and exact average of each snapshot.
    snapshots: Vec<(usize, u64, Vec<f64>)>,
    /// The exact average of each target.
    pub targets: Vec<Vec<f64>>,
    /// The root mean square of the weights at the end.
    pub size: f64,
}

impl Training {
    /// Simulates a training, and averages in f64.
    pub fn new(chains: Chains, movement: Movement, targets: &[f64]) -> Training {
        let mut parameters = Parameters::new(movement);
        Training::of(chains, ELEMENTS, |time| parameters.at(time), targets)
    }

    /// Averages parameters, given at each update, in f64.
    pub fn of(
        chains: Chains,
        elements: usize,
        mut parameters: impl FnMut(u64) -> Vec<f64>,
        targets: &[f64],
    ) -> Training {
        let times = chains.times();
        let profiles = [0.05, 0.28].map(|s| Profile::sigma_rel(s).unwrap());
        let new_shares = profiles.clone().map(|profile| chains.chain(&profile).decays(&times).one_minus_beta);
        let shares: Vec<Vec<f64>> = targets.iter().map(|&s| shares(s, &times)).collect();
        let mut averages = [vec![0.0; elements], vec![0.0; elements]];
        let mut exact = vec![vec![0.0; elements]; targets.len()];
        let mut snapshots = Vec::new();
        for (k, &time) in times.iter().enumerate() {
            let now = parameters(time);
            for (index, average) in averages.iter_mut().enumerate() {
                average.iter_mut().zip(&now).for_each(|(a, p)| *a += new_shares[index][k] * (p - *a));
                if time.is_multiple_of(CHECKPOINT_EVERY) {
                    snapshots.push((index, time, average.clone()));
                }
            }
            for (target, shares) in exact.iter_mut().zip(&shares) {
                target.iter_mut().zip(&now).for_each(|(t, p)| *t += shares[k] * p);
            }
        }
        let size = rms_difference(&averages[0], &vec![0.0; elements]);
        Training { chains, profiles, snapshots, targets: exact, size }
    }

    /// Writes the snapshots as a run, whose syntheses are in f64.
    pub fn write(&self, dir: &Path, dtype: Dtype) {
        write_tensors(dir, dtype, &[("weight", self, self.targets[0].len())]);
    }
}

/// Writes a run of tensors of given numbers of elements, which repeat the elements of a training each.
pub fn write_tensors(dir: &Path, dtype: Dtype, tensors: &[(&str, &Training, usize)]) {
    let Training { chains, profiles, snapshots, .. } = tensors[0].1;
    let dtypes: HashMap<&str, &str> = tensors.iter().map(|(name, ..)| (*name, "F64")).collect();
    for (at, (index, step, _)) in snapshots.iter().enumerate() {
        let profile = serde_json::to_string(&profiles[*index]).unwrap();
        let strings = [
            ("format", "pt".into()),
            ("posthoc_ema", "1".into()),
            ("profile", profile),
            ("step", step.to_string()),
            ("history", chains.history(*step)),
            ("dtypes", serde_json::to_string(&dtypes).unwrap()),
        ];
        let metadata: HashMap<String, String> = strings.map(|(key, value)| (key.to_owned(), value)).into();
        let values = |training: &Training, count| repeated(&training.snapshots[at].2, count);
        let bytes: Vec<(&str, usize, Vec<u8>)> = tensors
            .iter()
            .map(|&(name, training, count)| (name, count, stored(&values(training, count), dtype)))
            .collect();
        let views =
            bytes.iter().map(|(name, count, bytes)| (*name, TensorView::new(dtype, vec![*count], bytes).unwrap()));
        let path = dir.join(format!("{index}.{step}.safetensors"));
        safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
    }
}

/// Returns `count` elements that repeat the given ones.
pub fn repeated(values: &[f64], count: usize) -> Vec<f64> {
    values.iter().cycle().take(count).copied().collect()
}

/// Returns the weights of a target on the updates.
fn shares(sigma_rel: f64, times: &[u64]) -> Vec<f64> {
    let profile = Profile::sigma_rel(sigma_rel).unwrap();
    Chain::Tracked(profile).weights(times)
}

fn stored(values: &[f64], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f64(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f64(v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        _ => unreachable!(),
    }
}

/// Simulated parameters.
struct Parameters {
    movement: Movement,
    random: rand_chacha::ChaCha8Rng,
    start: Vec<f64>,
    slope: Vec<f64>,
    walked: Vec<f64>,
    previous: u64,
}

impl Parameters {
    fn new(movement: Movement) -> Parameters {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let start = (0..ELEMENTS).map(|_| normal(&mut random)).collect();
        let slope = (0..ELEMENTS).map(|_| normal(&mut random)).collect();
        Parameters { movement, random, start, slope, walked: vec![0.0; ELEMENTS], previous: 0 }
    }

    /// Advances to the next update, and returns the parameters there.
    fn at(&mut self, time: u64) -> Vec<f64> {
        let Movement { ramp, bent, power, walk, memory, white, swing, period, cooling, .. } = self.movement;
        let share = time as f64 / STEPS as f64;
        let delta = (time - self.previous) as f64;
        let heat = if cooling { 1.0 - share } else { 1.0 };
        let step = heat * walk * (delta / STEPS as f64).sqrt();
        let kept = (-delta / memory).exp();
        let angle = std::f64::consts::TAU * time as f64 / period;
        let moved = ramp * share + bent * share.powf(power) + swing * angle.sin();
        self.previous = time;
        let mut parameters = Vec::with_capacity(ELEMENTS);
        for i in 0..ELEMENTS {
            if walk > 0.0 {
                self.walked[i] = kept * self.walked[i] + step * normal(&mut self.random);
            }
            let noise = if white > 0.0 { heat * white * normal(&mut self.random) } else { 0.0 };
            parameters.push(self.start[i] + self.slope[i] * moved + self.walked[i] + noise);
        }
        parameters
    }
}

/// Returns a random number of mean 0 and variance 1, close to Gaussian.
fn normal(random: &mut rand_chacha::ChaCha8Rng) -> f64 {
    let sum: f64 = (0..4).map(|_| random.random::<f64>() - 0.5).sum();
    sum * 3f64.sqrt()
}

/// Returns the root mean square of a difference.
pub fn rms_difference(a: &[f64], b: &[f64]) -> f64 {
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / a.len() as f64).sqrt()
}
