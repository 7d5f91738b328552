//! Profiles: the weights of an average over time, as cumulative distributions `F_T(tau)`.

mod decay;
mod family;
mod window;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::conversion::{gamma_to_sigma_rel, sigma_rel_to_gamma};
use crate::error::{Error, Result};

use decay::Decay;
pub use family::{Family, Unit};
pub use window::{Shape, Window};

/// Distribution of an average's weight over time: the weights at time `T` of the parameters seen up to `T`.
///
/// One running average can track a power-function or exponential profile. The others can only be targets of a
/// synthesis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Kind", into = "Kind")]
pub struct Profile(Kind);

/// The stored form; `Profile` wraps only values that passed [`Kind::check`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Kind {
    Power {
        gamma: f64,
    },
    Exponential {
        #[serde(flatten)]
        decay: Decay,
    },
    Uniform {
        #[serde(flatten)]
        window: Window,
    },
    Linear {
        #[serde(flatten)]
        window: Window,
    },
    LrDecay {
        shape: Shape,
        #[serde(flatten)]
        window: Window,
    },
    Table {
        points: Vec<(f64, f64)>,
    },
}

impl Profile {
    /// Creates the power-function profile of relative standard deviation `sigma_rel` in (0, 1/sqrt 12].
    ///
    /// # Errors
    /// [`Error::Parameter`] outside that range.
    pub fn sigma_rel(sigma_rel: f64) -> Result<Profile> {
        Profile::gamma(sigma_rel_to_gamma(sigma_rel)?)
    }

    /// Creates the power-function profile `F_T(tau) = (tau/T)^(gamma+1)`, `gamma >= 0`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a negative, infinite or NaN `gamma`.
    pub fn gamma(gamma: f64) -> Result<Profile> {
        Profile::try_from(Kind::Power { gamma })
    }

    /// Creates the exponential profile (classical EMA) of decay `beta` per step in (0, 1).
    ///
    /// # Errors
    /// [`Error::Parameter`] outside that range.
    pub fn beta(beta: f64) -> Result<Profile> {
        Profile::try_from(Kind::Exponential { decay: Decay::Beta(beta) })
    }

    /// Creates the exponential profile that halves a weight in `steps` steps.
    ///
    /// It keeps the half-life itself, with all its digits.
    ///
    /// # Errors
    /// [`Error::Parameter`] unless `steps` is above 0 and finite, with a decay per step above 0.
    pub fn half_life(steps: f64) -> Result<Profile> {
        Profile::try_from(Kind::Exponential { decay: Decay::HalfLife(steps) })
    }

    /// Creates the profile of raw weights, without averaging: an exponential so short that nothing older counts.
    #[cfg(feature = "pytorch")]
    pub(crate) fn raw() -> Profile {
        Profile(Kind::Exponential { decay: Decay::HalfLife(decay::RAW) })
    }

    /// Creates the plain mean over a window.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window that is not above 0, or a fraction above 1.
    pub fn uniform(window: Window) -> Result<Profile> {
        Profile::try_from(Kind::Uniform { window })
    }

    /// Creates the profile whose weights grow linearly over a window.
    ///
    /// # Errors
    /// As [`Profile::uniform`].
    pub fn linear(window: Window) -> Result<Profile> {
        Profile::try_from(Kind::Linear { window })
    }

    /// Creates the average that replaces annealing the learning rate over a window (arXiv:2505.12082, 2507.17634).
    ///
    /// # Errors
    /// As [`Profile::uniform`].
    pub fn lr_decay(shape: Shape, window: Window) -> Result<Profile> {
        Profile::try_from(Kind::LrDecay { shape, window })
    }

    /// Creates any profile from points `(tau/T, F)`, with straight lines between them.
    ///
    /// `(0, 0)` is added if the first time is above 0.
    ///
    /// # Errors
    /// [`Error::Table`] unless times increase, shares do not decrease, both are in [0, 1], and the last point is
    /// `(1, 1)`.
    pub fn table(points: Vec<(f64, f64)>) -> Result<Profile> {
        Profile::try_from(Kind::Table { points })
    }

    /// Returns true if one running average can track this profile.
    pub fn is_trackable(&self) -> bool {
        matches!(self.0, Kind::Power { .. } | Kind::Exponential { .. })
    }

    /// Returns `gamma` of a power-function profile.
    pub fn as_gamma(&self) -> Option<f64> {
        match self.0 {
            Kind::Power { gamma } => Some(gamma),
            _ => None,
        }
    }

    /// Returns `sigma_rel` of a power-function profile.
    pub fn as_sigma_rel(&self) -> Option<f64> {
        self.as_gamma().map(gamma_to_sigma_rel)
    }

    /// Returns `beta` of an exponential profile; 1 for half-lives above 1e16 steps, whose decay rounds to it.
    pub fn as_beta(&self) -> Option<f64> {
        self.decay().map(Decay::beta)
    }

    /// Returns the half-life in steps of an exponential profile.
    pub fn as_half_life(&self) -> Option<f64> {
        self.decay().map(Decay::half_life)
    }

    /// Returns the standard deviation at time `at`, relative to it: [`Profile::as_sigma_rel`] of a power function, and
    /// about `1/((1-beta) T)` of an exponential profile. `None` for profiles that cannot be tracked.
    pub fn sigma_rel_at(&self, at: f64) -> Option<f64> {
        self.as_sigma_rel().or_else(|| self.decay().map(|decay| -1.0 / (decay.ln_over(1.0).exp_m1() * at)))
    }

    fn decay(&self) -> Option<Decay> {
        match self.0 {
            Kind::Exponential { decay } => Some(decay),
            _ => None,
        }
    }

    /// Checks that the profile exists at time `at`: its window may not be longer than that.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window in steps that is longer than `at`.
    pub fn check_at(&self, at: f64) -> Result<()> {
        match self.0 {
            Kind::Uniform { window: Window::Steps(steps) }
            | Kind::Linear { window: Window::Steps(steps) }
            | Kind::LrDecay { window: Window::Steps(steps), .. }
                if steps > at =>
            {
                let allowed = format!("a window in steps must be no longer than the target time, {at}");
                Err(Error::Parameter { name: "window", value: steps, allowed })
            }
            _ => Ok(()),
        }
    }

    /// Returns the time before which a profile has no mass: the start of its window, 0 without one.
    pub(super) fn edge(&self, at: f64) -> f64 {
        match self.0 {
            Kind::Uniform { window } | Kind::Linear { window } | Kind::LrDecay { window, .. } => at - window.steps(at),
            _ => 0.0,
        }
    }

    /// Returns `F_T(tau)`: the share of the average at time `at` of parameters seen at or before `tau`.
    pub fn cumulative(&self, tau: f64, at: f64) -> f64 {
        if tau <= 0.0 {
            return 0.0;
        }
        if tau >= at {
            return 1.0;
        }
        match &self.0 {
            Kind::Power { gamma } => (tau / at).powf(gamma + 1.0),
            Kind::Exponential { decay } => decay.ln_over(at - tau).exp(),
            Kind::Uniform { window } => window.elapsed(tau, at),
            Kind::Linear { window } => window.elapsed(tau, at).powi(2),
            Kind::LrDecay { shape, window } => 1.0 - shape.factor(window.elapsed(tau, at)),
            Kind::Table { points } => interpolate(points, tau / at),
        }
    }

    /// Returns `1 - beta` of an update at `time` that follows one at `previous`. For the first update, `previous` is 0
    /// and the result 1.
    ///
    /// It is computed without subtracting a decay near 1 from 1, which would cancel. For profiles that cannot be
    /// tracked it is the share of the average at `time` that is newer than `previous`.
    pub fn one_minus_beta(&self, previous: f64, time: f64) -> f64 {
        if previous <= 0.0 {
            return 1.0;
        }
        match self.0 {
            Kind::Power { gamma } => -((gamma + 1.0) * (-(time - previous) / time).ln_1p()).exp_m1(),
            Kind::Exponential { decay } => -decay.ln_over(time - previous).exp_m1(),
            _ => 1.0 - self.cumulative(previous, time),
        }
    }
}

fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let after = points.partition_point(|&(time, _)| time < x).clamp(1, points.len() - 1);
    let (x0, f0) = points[after - 1];
    let (x1, f1) = points[after];
    // Rounding may end the line one bit above its last point; the share would decrease there.
    (f0 + (f1 - f0) * ((x - x0) / (x1 - x0)).clamp(0.0, 1.0)).min(f1)
}

impl Kind {
    fn check(&self) -> Result<()> {
        match self {
            Kind::Power { gamma } if !(*gamma >= 0.0 && gamma.is_finite()) => Err(Error::Parameter {
                name: "gamma",
                value: *gamma,
                allowed: "must be 0 (the plain mean, sigma_rel 0.288675) or above, and finite".into(),
            }),
            Kind::Exponential { decay } => decay.check(),
            Kind::Uniform { window } | Kind::Linear { window } | Kind::LrDecay { window, .. } => window.check(),
            Kind::Table { points } => check_table(points),
            _ => Ok(()),
        }
    }
}

fn check_table(points: &[(f64, f64)]) -> Result<()> {
    let fail = |point: usize, reason: String| Err(Error::Table { point: point + 1, reason });
    let mut last = (-1.0, 0.0);
    for (i, &(x, share)) in points.iter().enumerate() {
        if !((0.0..=1.0).contains(&x) && (0.0..=1.0).contains(&share)) {
            return fail(i, format!("({x}, {share}): the time tau/T and the share must both be in [0, 1]"));
        }
        if x <= last.0 {
            return fail(i, format!("time {x} does not follow {}: times must increase", last.0));
        }
        if share < last.1 {
            return fail(i, format!("share {share} is below {}: cumulative shares must not decrease", last.1));
        }
        last = (x, share);
    }
    if last != (1.0, 1.0) {
        return fail(points.len().saturating_sub(1), "the last point must be (1, 1)".into());
    }
    Ok(())
}

impl TryFrom<Kind> for Profile {
    type Error = Error;

    fn try_from(mut kind: Kind) -> Result<Profile> {
        kind.check()?;
        if let Kind::Table { points } = &mut kind
            && points[0].0 > 0.0
        {
            points.insert(0, (0.0, 0.0));
        }
        Ok(Profile(kind))
    }
}

impl From<Profile> for Kind {
    fn from(profile: Profile) -> Kind {
        profile.0
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Power { gamma } => write!(f, "sigma_rel {}", short(gamma_to_sigma_rel(*gamma))),
            Kind::Exponential { decay } => decay.fmt(f),
            Kind::Uniform { window } => write!(f, "uniform {window}"),
            Kind::Linear { window } => write!(f, "linear {window}"),
            Kind::LrDecay { shape, window } => write!(f, "lr-decay {shape} {window}"),
            Kind::Table { points } => write!(f, "table of {} points", points.len()),
        }
    }
}

/// Formats a number to ten significant digits without trailing zeros.
///
/// A `sigma_rel` of 0.15 is shown as 0.15 after its conversion to `gamma` and back.
fn short(value: f64) -> String {
    let rounded: f64 = format!("{value:.9e}").parse().unwrap_or(value);
    rounded.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Profile> {
        let half = Window::Fraction(0.5);
        vec![
            Profile::sigma_rel(0.1).unwrap(),
            Profile::gamma(0.0).unwrap(),
            Profile::beta(0.99).unwrap(),
            Profile::half_life(30.0).unwrap(),
            Profile::uniform(Window::Steps(40.0)).unwrap(),
            Profile::uniform(half).unwrap(),
            Profile::linear(half).unwrap(),
            Profile::lr_decay(Shape::Linear, half).unwrap(),
            Profile::lr_decay(Shape::Cosine, half).unwrap(),
            Profile::lr_decay(Shape::OneMinusSqrt, half).unwrap(),
            Profile::table(vec![(0.5, 0.1), (0.9, 0.4), (1.0, 1.0)]).unwrap(),
        ]
    }

    #[test]
    fn profiles_are_cumulative_distributions() {
        for profile in all() {
            let at = 100.0;
            assert_eq!(profile.cumulative(0.0, at), 0.0);
            assert_eq!(profile.cumulative(at, at), 1.0);
            let values: Vec<f64> = (0..=1000).map(|i| profile.cumulative(f64::from(i) * 0.1, at)).collect();
            assert!(values.windows(2).all(|pair| pair[0] <= pair[1]), "{profile} decreases");
        }
    }

    #[test]
    fn trackable_profiles_factor_through_any_time_between() {
        for profile in all().into_iter().filter(Profile::is_trackable) {
            for (tau, s, t) in [(3.0, 10.0, 50.0), (1.0, 99.0, 100.0), (40.0, 40.0, 41.0)] {
                let product = profile.cumulative(s, t) * profile.cumulative(tau, s);
                let direct = profile.cumulative(tau, t);
                assert!((product - direct).abs() <= 1e-14 * direct, "{profile}: {product} is not {direct}");
                let one_minus_beta = profile.one_minus_beta(s, t);
                assert!((one_minus_beta - (1.0 - profile.cumulative(s, t))).abs() < 1e-15, "{profile}");
            }
        }
    }

    #[test]
    fn one_minus_beta_keeps_its_digits_late_in_training() {
        // (gamma+1)/t to first order; 1 - powf would keep seven digits of it.
        let one_minus_beta = Profile::gamma(3.0).unwrap().one_minus_beta(1e9 - 1.0, 1e9);
        assert!((one_minus_beta - 4e-9 * (1.0 - 1.5e-9)).abs() < 1e-22, "{one_minus_beta}");
    }

    /// Half-lives up to 1e18 steps, against 40-digit values of `1 - 2^(-d/h)`.
    #[test]
    fn half_lives_keep_fifteen_digits() {
        for (half_life, steps, expected) in [
            (3.0, 1.0, 0.206_299_474_015_900_26),
            (1e9, 1.0, 6.931_471_803_197_188e-10),
            (1e12, 10.0, 6.931_471_805_575_43e-12),
            (1e15, 1.0, 6.931_471_805_599_451e-16),
            (1e18, 1.0, 6.931_471_805_599_453e-19),
            (1e18, 1000.0, 6.931_471_805_599_451e-16),
        ] {
            let profile = Profile::half_life(half_life).unwrap();
            let found = profile.one_minus_beta(1e3, 1e3 + steps);
            assert!((found / expected - 1.0).abs() < 1e-15, "{half_life}: {found} is not {expected}");
            assert_eq!(profile.as_half_life(), Some(half_life));
            let restored: Profile = serde_json::from_str(&serde_json::to_string(&profile).unwrap()).unwrap();
            assert_eq!(restored.as_half_life(), Some(half_life));
            let relative = profile.sigma_rel_at(half_life).unwrap();
            // The standard deviation is the half-life over ln 2, plus half a step.
            let deviation = half_life / std::f64::consts::LN_2 + 0.5;
            assert!((relative * half_life / deviation - 1.0).abs() < 0.02 / half_life.min(1e13), "{half_life}");
        }
        assert_ne!(Profile::half_life(1e18).unwrap(), Profile::half_life(2e18).unwrap());
    }

    /// Older versions stored the decay per step of a half-life.
    #[test]
    fn half_life_equals_its_stored_decay_per_step() {
        let stored: Profile = serde_json::from_str(r#"{"kind":"exponential","beta":0.9828205985452511}"#).unwrap();
        assert_eq!(Profile::half_life(40.0).unwrap(), stored);
        assert_ne!(Profile::half_life(41.0).unwrap(), stored);
        let new = serde_json::to_string(&Profile::half_life(40.0).unwrap()).unwrap();
        assert_eq!(new, r#"{"kind":"exponential","half_life":40.0}"#);
    }

    #[test]
    fn power_function_has_standard_deviation_sigma_rel() {
        for sigma_rel in [0.05, 0.1, 0.2, 0.28] {
            let profile = Profile::sigma_rel(sigma_rel).unwrap();
            let n = 200_000;
            let mut mean = 0.0;
            let mut square = 0.0;
            for i in 0..n {
                let a = f64::from(i) / f64::from(n);
                let b = f64::from(i + 1) / f64::from(n);
                let mass = profile.cumulative(b, 1.0) - profile.cumulative(a, 1.0);
                mean += mass * (a + b) / 2.0;
                square += mass * ((a + b) / 2.0).powi(2);
            }
            assert!(((square - mean * mean).sqrt() - sigma_rel).abs() < 1e-8);
        }
    }

    #[test]
    fn table_shares_never_decrease() {
        // Without the limit, 0.9000000000000001 at 60 would be followed by 0.9 at 61.
        let table = Profile::table(vec![(0.2, 0.29), (0.6, 0.9), (0.7, 0.9), (1.0, 1.0)]).unwrap();
        let shares: Vec<f64> = (0..=100).map(|tau| table.cumulative(f64::from(tau), 100.0)).collect();
        assert!(shares.is_sorted() && shares[60] == 0.9 && shares[100] == 1.0, "{shares:?}");
    }

    #[test]
    fn profiles_survive_json() {
        for profile in all() {
            let text = serde_json::to_string(&profile).unwrap();
            assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), profile, "{text}");
        }
        let uniform: Profile = serde_json::from_str(r#"{"kind":"uniform","window":5000}"#).unwrap();
        assert_eq!(uniform, Profile::uniform(Window::Steps(5000.0)).unwrap());
        assert_eq!(serde_json::to_string(&uniform).unwrap(), r#"{"kind":"uniform","window":5000.0}"#);
    }

    #[test]
    fn invalid_stored_profiles_are_an_error() {
        for text in [
            r#"{"kind":"power","gamma":-1.0}"#,
            r#"{"kind":"exponential","beta":1.0}"#,
            r#"{"kind":"exponential"}"#,
            r#"{"kind":"exponential","half_life":0.0}"#,
            r#"{"kind":"exponential","half_life":1e999}"#,
            r#"{"kind":"uniform","window":0}"#,
            r#"{"kind":"uniform"}"#,
            r#"{"kind":"linear","fraction":1.5}"#,
            r#"{"kind":"table","points":[]}"#,
            r#"{"kind":"table","points":[[0.5,0.5],[0.5,1.0]]}"#,
            r#"{"kind":"table","points":[[0.5,0.5],[0.9,0.4],[1.0,1.0]]}"#,
            r#"{"kind":"table","points":[[0.5,0.5]]}"#,
            r#"{"kind":"wavelet"}"#,
        ] {
            assert!(serde_json::from_str::<Profile>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn profiles_display_with_short_numbers() {
        let names: Vec<String> = all().iter().map(ToString::to_string).collect();
        assert_eq!(names[0], "sigma_rel 0.1");
        assert_eq!((names[2].as_str(), names[3].as_str()), ("beta 0.99", "half_life 30"));
        assert_eq!(names[4], "uniform 40");
        assert_eq!(names[9], "lr-decay 1-sqrt 50%");
    }

    #[test]
    fn window_longer_than_the_time_is_an_error() {
        let profile = Profile::uniform(Window::Steps(5000.0)).unwrap();
        assert!(profile.check_at(4999.0).is_err());
        assert!(profile.check_at(5000.0).is_ok());
    }
}
