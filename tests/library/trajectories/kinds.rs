//! Forty kinds of movement of parameters, as they occur in trainings and as they are hard to predict.

use std::f64::consts::{PI, TAU};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{STEPS, normal};

/// A kind of movement. Sizes are relative to the weights; functions are of the share of the training that is over.
#[derive(Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    /// Place of all elements on lines of random slopes.
    line: fn(f64) -> f64,
    /// Speed along these lines, added to `line`.
    speed: fn(f64) -> f64,
    /// Size of a random walk over a whole training.
    walk: fn(f64) -> f64,
    /// Time constant of the walk's decay, in steps.
    memory: f64,
    /// Size of the noise of each update.
    white: fn(f64) -> f64,
}

fn none(_: f64) -> f64 {
    0.0
}

/// A cosine schedule of the learning rate.
fn cosine(s: f64) -> f64 {
    0.5 * (1.0 + (PI * s).cos())
}

/// A constant learning rate that is divided by 10 at one half and at three quarters.
fn steps(s: f64) -> f64 {
    match s {
        _ if s < 0.5 => 1.0,
        _ if s < 0.75 => 0.1,
        _ => 0.01,
    }
}

fn warm_up(s: f64) -> f64 {
    (s / 0.05).min(1.0) * cosine(s)
}

/// A constant learning rate that falls to 0 in the last tenth.
fn decay_at_last(s: f64) -> f64 {
    ((1.0 - s) / 0.1).min(1.0)
}

/// A cosine schedule with five restarts.
fn restarts(s: f64) -> f64 {
    cosine((5.0 * s - 1e-9).rem_euclid(1.0))
}

/// Returns true for every second update.
fn is_even(s: f64) -> bool {
    (s * STEPS as f64 / 10.0).round() % 2.0 == 0.0
}

/// Places of ten jumps.
// One of them happens to be near 1/pi.
#[allow(clippy::approx_constant)]
fn jumps(s: f64) -> f64 {
    let all = [0.053, 0.081, 0.243, 0.318, 0.442, 0.507, 0.691, 0.774, 0.826, 0.953];
    let sizes = [1.2, -0.4, 0.9, -1.7, 0.3, 1.1, -0.6, 0.8, -1.3, 0.5];
    all.iter().zip(sizes).filter(|(at, _)| s > **at).map(|(_, size)| 0.1 * size).sum()
}

fn swing(s: f64, period: f64) -> f64 {
    (TAU * s / period).sin()
}

impl Kind {
    fn of(name: &'static str) -> Kind {
        Kind { name, line: none, speed: none, walk: none, memory: f64::INFINITY, white: none }
    }

    fn line(name: &'static str, line: fn(f64) -> f64) -> Kind {
        Kind { line, ..Kind::of(name) }
    }

    fn walk(name: &'static str, walk: fn(f64) -> f64) -> Kind {
        Kind { walk, ..Kind::of(name) }
    }

    /// Returns all kinds.
    pub fn all() -> Vec<Kind> {
        let mut all = Kind::steady();
        all.extend(Kind::schedules());
        all.extend(Kind::converging());
        all.extend(Kind::swings_and_events());
        all
    }

    /// Lines, walks and noise that do not change with time.
    fn steady() -> Vec<Kind> {
        vec![
            Kind { speed: |_| 0.5, walk: |_| 0.3, white: |_| 0.05, ..Kind::of("mixed") },
            Kind { speed: |_| 0.02, walk: |_| 0.02, white: |_| 0.1, ..Kind::of("mixed, noisy") },
            Kind { speed: |_| 1e-3, walk: |_| 3e-4, white: |_| 1e-4, ..Kind::of("mixed, slow") },
            Kind::line("straight line", |s| s),
            Kind::walk("random walk", |_| 0.5),
            Kind { white: |_| 0.1, ..Kind::of("white noise") },
            Kind { walk: |_| 1.4, memory: 100.0, ..Kind::of("forgetful walk, 0.005 of the training") },
            Kind { walk: |_| 0.6, memory: 500.0, speed: |_| 0.02, ..Kind::of("forgetful walk, 0.025, and line") },
            Kind { walk: |_| 0.2, memory: 5000.0, ..Kind::of("forgetful walk, 0.25") },
        ]
    }

    /// Learning rates that change.
    fn schedules() -> Vec<Kind> {
        vec![
            Kind { speed: cosine, ..Kind::of("cosine learning rate: line") },
            Kind::walk("cosine learning rate: walk", |s| 0.3 * cosine(s)),
            Kind {
                speed: |s| 0.5 * cosine(s),
                walk: |s| 0.1 * cosine(s),
                white: |s| 0.05 * cosine(s),
                ..Kind::of("cosine learning rate: all")
            },
            Kind {
                speed: |_| 0.1,
                walk: |s| 0.3 * (1.0 - s),
                white: |s| 0.05 * (1.0 - s),
                ..Kind::of("learning rate that falls to 0")
            },
            Kind {
                speed: |s| 0.5 * steps(s),
                walk: |s| 0.2 * steps(s),
                white: |s| 0.05 * steps(s),
                ..Kind::of("learning rate in steps")
            },
            Kind {
                speed: |s| 0.5 * warm_up(s),
                walk: |s| 0.5 * warm_up(s),
                memory: 200.0,
                ..Kind::of("warm-up and cosine")
            },
            Kind {
                line: |s| 0.1 * ((s - 0.9) / 0.1).max(0.0),
                walk: |s| 0.2 * decay_at_last(s),
                white: |s| 0.05 * decay_at_last(s),
                ..Kind::of("constant, then a fall in the last tenth")
            },
            Kind {
                speed: |s| 0.3 * restarts(s),
                walk: |s| 0.1 * restarts(s),
                white: |s| 0.03 * restarts(s),
                ..Kind::of("five restarts")
            },
        ]
    }

    /// Movement that is fast at first or at last.
    fn converging() -> Vec<Kind> {
        vec![
            Kind::line("fast start, exp(-t/0.01T)", |s| 0.5 * (-s / 0.01).exp()),
            Kind::line("fast start, exp(-t/0.03T)", |s| 0.5 * (-s / 0.03).exp()),
            Kind {
                line: |s| 0.5 * (-s / 0.03).exp(),
                walk: |_| 0.02,
                white: |_| 0.002,
                ..Kind::of("fast start, then walk")
            },
            Kind::line("convergence, exp(-t/0.2T)", |s| 0.5 * (-s / 0.2).exp()),
            Kind { line: |s| 0.5 * (-s / 0.2).exp(), white: |_| 0.01, ..Kind::of("convergence, then noise") },
            Kind::line("square root", |s| s.sqrt()),
            Kind::line("power 0.1", |s| 0.5 * s.powf(0.1)),
            Kind::line("power 4", |s| 0.5 * s.powi(4)),
            Kind::line("logarithm", |s| 0.1 * (s * STEPS as f64).ln()),
            Kind::line("square root of the logarithm", |s| 0.3 * (s * STEPS as f64).ln().sqrt()),
            Kind::line("line of the last tenth", |s| 0.3 * ((s - 0.9) / 0.1).max(0.0)),
            Kind::line("line that turns at one half", |s| 0.3 * (s - 0.5).abs()),
        ]
    }

    /// Movement that comes and goes, and single events.
    fn swings_and_events() -> Vec<Kind> {
        vec![
            Kind::line("swing of half a spacing", |s| 0.01 * swing(s, 0.025)),
            Kind::line("swing of a spacing", |s| 0.02 * swing(s, 0.05)),
            Kind::line("swing of 1.5 spacings", |s| 0.02 * swing(s, 0.075)),
            Kind::line("swing of 3.1 spacings", |s| 0.03 * swing(s, 0.155)),
            Kind::line("swing of half the training", |s| 0.3 * swing(s, 0.5)),
            Kind::line("alternating updates", |s| if is_even(s) { 0.05 } else { -0.05 }),
            Kind::line("ten rare jumps", jumps),
            Kind::line("spike of one update", |s| f64::from(u8::from((s - 0.613).abs() < 1e-4))),
            Kind::line("jump at 93%", |s| if s > 0.93 { 0.3 } else { 0.0 }),
            Kind::line("jump at one half", |s| if s > 0.513 { 0.3 } else { 0.0 }),
            Kind::line("excursion", |s| if s > 0.62 { 0.5 * ((0.62 - s) / 0.01).exp() } else { 0.0 }),
        ]
    }

    /// Returns the parameters as a function of the time of each update in turn.
    pub fn parameters(self, elements: usize) -> impl FnMut(u64) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let normals = |random: &mut ChaCha8Rng| (0..elements).map(|_| normal(random)).collect::<Vec<f64>>();
        let start = normals(&mut random);
        let slopes = normals(&mut random);
        let mut walked = vec![0.0; elements];
        let mut covered = 0.0;
        let mut previous = 0;
        move |time| {
            let share = time as f64 / STEPS as f64;
            let delta = (time - previous) as f64;
            previous = time;
            covered += (self.speed)(share) * delta / STEPS as f64;
            let place = covered + (self.line)(share);
            let kept = (-delta / self.memory).exp();
            let step = (self.walk)(share) * (delta / STEPS as f64).sqrt();
            let white = (self.white)(share);
            let mut at = |i: usize| {
                if step > 0.0 {
                    walked[i] = kept * walked[i] + step * normal(&mut random);
                }
                let noise = if white > 0.0 { white * normal(&mut random) } else { 0.0 };
                start[i] + slopes[i] * place + walked[i] + noise
            };
            (0..elements).map(&mut at).collect()
        }
    }
}
