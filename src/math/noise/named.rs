//! Kinds of movement that a user names before a training.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use faer::Mat;
use rayon::prelude::*;

use super::super::solve::Updates;
use super::cells::Cells;
use super::movement::white_responses;

/// Time constant of [`MovementKind::Converge`], as a share of the training.
const CONVERGENCE: f64 = 0.2;

/// A kind of movement of parameters over a training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovementKind {
    /// A random walk of equal steps: a constant learning rate.
    Walk,
    /// A random walk whose steps fall to 0 as half a cosine: a cosine schedule of the learning rate.
    Cosine,
    /// A straight line at constant speed.
    Line,
    /// An approach to the end, `exp(-t/0.2T)`: a loss that converges.
    Converge,
    /// Independent noise of each update about a fixed value.
    Noise,
}

/// All kinds with their names.
const KINDS: [(MovementKind, &str); 5] = [
    (MovementKind::Walk, "walk"),
    (MovementKind::Cosine, "cosine"),
    (MovementKind::Line, "line"),
    (MovementKind::Converge, "converge"),
    (MovementKind::Noise, "noise"),
];

/// Movement that is expected of a training: a sum of kinds, each with its size.
///
/// The size is a root mean square over the elements, relative to the weights at the end: of the way from the first to
/// the last update, or of the noise of one update. The text is `walk`, `walk:0.3` or `walk:0.3+noise:0.01`; without a
/// size, it is 1.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedMovement {
    parts: Vec<(MovementKind, f64)>,
}

impl FromStr for NamedMovement {
    type Err = String;

    fn from_str(text: &str) -> Result<NamedMovement, String> {
        let part = |part: &str| {
            let (name, size) = part.split_once(':').unwrap_or((part, "1"));
            let kind = KINDS.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind);
            let names = KINDS.map(|(_, name)| name).join(", ");
            let kind = kind.ok_or_else(|| format!("`{name}` is not a kind of movement: use {names}"))?;
            let size: f64 = size.parse().ok().filter(|size| *size > 0.0 && *size <= 1e6).ok_or_else(|| {
                format!("`{size}` is not a size of a movement: use a number above 0 and at most 1e6, as in {name}:0.3")
            })?;
            Ok((kind, size))
        };
        Ok(NamedMovement { parts: text.split('+').map(part).collect::<Result<_, String>>()? })
    }
}

/// Writes the form that [`FromStr`] parses.
impl fmt::Display for NamedMovement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (kind, size)) in self.parts.iter().enumerate() {
            let name = KINDS.iter().find(|(known, _)| known == kind).map_or("", |(_, name)| name);
            write!(f, "{}{name}:{size}", if i > 0 { "+" } else { "" })?;
        }
        Ok(())
    }
}

/// Movement of a kind at the updates of one training.
pub(super) struct NamedBasis<'a> {
    updates: &'a Updates,
    cells: Cells,
    movement: &'a NamedMovement,
    /// The length of the training.
    steps: f64,
}

/// Responses of weights on updates, or on cells of updates.
#[derive(Clone, Copy)]
struct Responses<'a> {
    times: &'a [f64],
    weights: &'a [f64],
    /// The responses to a random walk of unit variance per step.
    walk: &'a [f64],
    /// The mean square for noise of unit variance at each update.
    white: f64,
}

impl<'a> NamedBasis<'a> {
    pub(super) fn new(updates: &'a Updates, movement: &'a NamedMovement, steps: u64) -> NamedBasis<'a> {
        NamedBasis { updates, cells: Cells::new(updates, &updates.marks), movement, steps: steps as f64 }
    }

    /// Returns the mean square of a blend of the parameters, with weights on the updates whose sum is 0.
    pub(super) fn mean_square(&self, weights: &[f64]) -> f64 {
        let Updates { times, counts, .. } = self.updates;
        // Each update is a cell of its own: the step before it is seen by it and all later updates.
        let mut later = 0.0;
        let mut walk = vec![0.0; weights.len()];
        for k in (1..weights.len()).rev() {
            later += weights[k];
            walk[k] = later * ((times[k] - times[k - 1]) as f64).sqrt();
        }
        let white = weights.iter().zip(counts).map(|(weight, count)| weight * weight / count).sum();
        let times: Vec<f64> = times.iter().map(|&time| time as f64).collect();
        self.sum(&Responses { times: &times, weights, walk: &walk, white })
    }

    /// Returns the mean square movement of all kinds together.
    fn sum(&self, responses: &Responses<'_>) -> f64 {
        let Responses { times, weights, walk, white } = *responses;
        let share_over = |i: usize| times[i] / self.steps;
        let walked = |speed: fn(f64) -> f64| -> f64 {
            let square = |(i, response): (usize, &f64)| (speed(share_over(i)) * response).powi(2);
            walk.iter().enumerate().map(square).sum::<f64>() / self.steps
        };
        let along = |place: fn(f64) -> f64| -> f64 {
            weights.iter().enumerate().map(|(i, weight)| weight * place(share_over(i))).sum::<f64>().powi(2)
        };
        let of_part = |(kind, size): &(MovementKind, f64)| {
            size * size
                * match kind {
                    MovementKind::Walk => walked(|_| 1.0),
                    // The mean of the squared speed is 3/8.
                    MovementKind::Cosine => walked(|s| 0.5 * (1.0 + (PI * s).cos())) * 8.0 / 3.0,
                    MovementKind::Line => along(|s| s),
                    MovementKind::Converge => along(|s| (-s / CONVERGENCE).exp() / (1.0 - (-1.0 / CONVERGENCE).exp())),
                    MovementKind::Noise => white,
                }
        };
        self.movement.parts.iter().map(of_part).sum()
    }

    /// Returns the mean square movement between each pair of sources.
    pub(super) fn distances(&self) -> Mat<f64> {
        let Updates { decays, marks, sources, .. } = self.updates;
        let shares: Vec<Vec<Vec<f64>>> = decays.iter().map(|decays| self.cells.shares(decays, marks)).collect();
        let of = |source: usize| &shares[sources[source].0][sources[source].1];
        let distance = |i: usize, j: usize| {
            let difference: Vec<f64> = of(i).iter().zip(of(j)).map(|(a, b)| a - b).collect();
            let white = white_responses(&difference, &self.cells.counts).iter().map(|r| r * r).sum();
            let walk = self.cells.responses(&difference).0;
            self.sum(&Responses { times: &self.cells.times, weights: &difference, walk: &walk, white })
        };
        let n = sources.len();
        let rows: Vec<Vec<f64>> = (0..n).into_par_iter().map(|i| (0..i).map(|j| distance(i, j)).collect()).collect();
        Mat::from_fn(n, n, |i, j| if i == j { 0.0 } else { rows[i.max(j)][i.min(j)] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_movement_is_parsed_back() {
        for (text, shown) in [("walk", "walk:1"), ("cosine:0.3+noise:0.01", "cosine:0.3+noise:0.01")] {
            assert_eq!(text.parse::<NamedMovement>().unwrap().to_string(), shown);
        }
        for text in ["", "run", "walk:", "walk:0", "walk:-1", "walk:NaN", "walk:inf", "walk+", "walk:1:2"] {
            let error = text.parse::<NamedMovement>().unwrap_err();
            assert!(error.contains("use "), "{text}: {error}");
        }
    }
}
