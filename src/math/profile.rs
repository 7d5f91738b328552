//! Profiles: how an average weighs time, as cumulative distributions `F_T(tau)`.

mod family;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::conversion::{gamma_to_sigma_rel, half_life_to_beta, sigma_rel_to_gamma};
use crate::error::{Error, Result};

pub use family::{Family, Unit};

/// How an average at time `T` weighs the parameters seen at times up to `T`.
///
/// Power-function and exponential profiles can be tracked by one running average; the others can only be asked for
/// as targets of a synthesis.
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
        beta: f64,
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

/// How far back a profile of finite length reaches.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Window {
    /// In steps.
    #[serde(rename = "window")]
    Steps(f64),
    /// As a share of the target time, in (0, 1].
    #[serde(rename = "fraction")]
    Fraction(f64),
}

/// The schedule of a learning rate that falls from 1 to 0 over the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// `1 - u`.
    Linear,
    /// `(1 + cos(pi u)) / 2`.
    Cosine,
    /// `1 - sqrt(u)`.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl Profile {
    /// The power-function profile of relative standard deviation `sigma_rel` in (0, 1/sqrt 12].
    ///
    /// # Errors
    /// [`Error::Parameter`] outside that range.
    pub fn sigma_rel(sigma_rel: f64) -> Result<Profile> {
        Profile::gamma(sigma_rel_to_gamma(sigma_rel)?)
    }

    /// The power-function profile `F_T(tau) = (tau/T)^(gamma+1)`, `gamma >= 0`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a negative, infinite or NaN `gamma`.
    pub fn gamma(gamma: f64) -> Result<Profile> {
        Profile::try_from(Kind::Power { gamma })
    }

    /// The exponential profile (classical EMA) of decay `beta` per step in (0, 1).
    ///
    /// # Errors
    /// [`Error::Parameter`] outside that range.
    pub fn beta(beta: f64) -> Result<Profile> {
        Profile::try_from(Kind::Exponential { beta })
    }

    /// The exponential profile that halves a weight in `steps` steps.
    ///
    /// # Errors
    /// [`Error::Parameter`] unless `steps` is above 0 and short enough for its decay to differ from 1.
    pub fn half_life(steps: f64) -> Result<Profile> {
        let beta = half_life_to_beta(steps);
        if !(steps > 0.0 && beta > 0.0 && beta < 1.0) {
            let allowed = "a half-life is a number of steps above 0 whose decay 2^(-1/h) lies in (0, 1)".into();
            return Err(Error::Parameter { name: "half_life", value: steps, allowed });
        }
        Profile::beta(beta)
    }

    /// The plain mean over a window.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window that is not above 0, or a fraction above 1.
    pub fn uniform(window: Window) -> Result<Profile> {
        Profile::try_from(Kind::Uniform { window })
    }

    /// Weights that grow linearly over a window.
    ///
    /// # Errors
    /// As [`Profile::uniform`].
    pub fn linear(window: Window) -> Result<Profile> {
        Profile::try_from(Kind::Linear { window })
    }

    /// The average that stands in for annealing the learning rate over a window (arXiv:2505.12082, 2507.17634).
    ///
    /// # Errors
    /// As [`Profile::uniform`].
    pub fn lr_decay(shape: Shape, window: Window) -> Result<Profile> {
        Profile::try_from(Kind::LrDecay { shape, window })
    }

    /// Any profile, as points `(tau/T, F)` with straight lines between them; `(0, 0)` is added where it is missing.
    ///
    /// # Errors
    /// [`Error::Table`] unless times grow, shares do not fall, all lie in [0, 1], and the last point is `(1, 1)`.
    pub fn table(points: Vec<(f64, f64)>) -> Result<Profile> {
        Profile::try_from(Kind::Table { points })
    }

    /// Whether one running average can track this profile.
    pub fn is_trackable(&self) -> bool {
        matches!(self.0, Kind::Power { .. } | Kind::Exponential { .. })
    }

    /// `gamma` of a power-function profile.
    pub fn as_gamma(&self) -> Option<f64> {
        match self.0 {
            Kind::Power { gamma } => Some(gamma),
            _ => None,
        }
    }

    /// `sigma_rel` of a power-function profile.
    pub fn as_sigma_rel(&self) -> Option<f64> {
        self.as_gamma().map(gamma_to_sigma_rel)
    }

    /// `beta` of an exponential profile.
    pub fn as_beta(&self) -> Option<f64> {
        match self.0 {
            Kind::Exponential { beta } => Some(beta),
            _ => None,
        }
    }

    /// Checks that the profile means something at time `at`: no window may be longer than the time.
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
                let allowed = format!("a window in steps can be no longer than the target time, {at}");
                Err(Error::Parameter { name: "window", value: steps, allowed })
            }
            _ => Ok(()),
        }
    }

    /// `F_T(tau)`: the share of the average at time `at` that belongs to parameters seen at or before `tau`.
    pub fn cumulative(&self, tau: f64, at: f64) -> f64 {
        if tau <= 0.0 {
            return 0.0;
        }
        if tau >= at {
            return 1.0;
        }
        match &self.0 {
            Kind::Power { gamma } => (tau / at).powf(gamma + 1.0),
            Kind::Exponential { beta } => (beta.ln() * (at - tau)).exp(),
            Kind::Uniform { window } => window.elapsed(tau, at),
            Kind::Linear { window } => window.elapsed(tau, at).powi(2),
            Kind::LrDecay { shape, window } => 1.0 - shape.factor(window.elapsed(tau, at)),
            Kind::Table { points } => interpolate(points, tau / at),
        }
    }

    /// `1 - beta` of an update at `time` that follows one at `previous` (0 for the first), without the cancellation
    /// of subtracting a decay near 1 from 1.
    ///
    /// For profiles that cannot be tracked it is the share of the mass up to `time` that is newer than `previous`.
    pub fn gain(&self, previous: f64, time: f64) -> f64 {
        if previous <= 0.0 {
            return 1.0;
        }
        match self.0 {
            Kind::Power { gamma } => -((gamma + 1.0) * (-(time - previous) / time).ln_1p()).exp_m1(),
            Kind::Exponential { beta } => -(beta.ln() * (time - previous)).exp_m1(),
            _ => 1.0 - self.cumulative(previous, time),
        }
    }
}

impl Window {
    /// The share of the window that has passed at `tau`, in [0, 1].
    fn elapsed(self, tau: f64, at: f64) -> f64 {
        let steps = match self {
            Window::Steps(steps) => steps,
            Window::Fraction(fraction) => fraction * at,
        };
        ((tau - (at - steps)) / steps).clamp(0.0, 1.0)
    }

    fn check(self) -> Result<()> {
        let (value, most, allowed) = match self {
            Window::Steps(steps) => (steps, f64::MAX, "a window is a number of steps above 0"),
            Window::Fraction(fraction) => (fraction, 1.0, "a window as a share of the time is above 0 and at most 1"),
        };
        if value > 0.0 && value <= most {
            return Ok(());
        }
        Err(Error::Parameter { name: "window", value, allowed: allowed.into() })
    }
}

impl Shape {
    fn factor(self, u: f64) -> f64 {
        match self {
            Shape::Linear => 1.0 - u,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * u).cos()),
            Shape::OneMinusSqrt => 1.0 - u.sqrt(),
        }
    }
}

fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let after = points.partition_point(|&(time, _)| time < x).clamp(1, points.len() - 1);
    let ((x0, f0), (x1, f1)) = (points[after - 1], points[after]);
    // Rounded, the line would end above its last point by a bit, and the share would fall there.
    (f0 + (f1 - f0) * ((x - x0) / (x1 - x0)).clamp(0.0, 1.0)).min(f1)
}

impl Kind {
    fn check(&self) -> Result<()> {
        match self {
            Kind::Power { gamma } if !(*gamma >= 0.0 && gamma.is_finite()) => Err(Error::Parameter {
                name: "gamma",
                value: *gamma,
                allowed: "must be 0 (the plain mean, sigma_rel 0.288675: nothing is wider) or above".into(),
            }),
            Kind::Exponential { beta } if !(*beta > 0.0 && *beta < 1.0) => Err(Error::Parameter {
                name: "beta",
                value: *beta,
                allowed: "a decay per step lies between 0 and 1, both excluded".into(),
            }),
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
            return fail(i, format!("({x}, {share}): both the time tau/T and the share lie in [0, 1]"));
        }
        if x <= last.0 {
            return fail(i, format!("time {x} does not follow {}: times must grow", last.0));
        }
        if share < last.1 {
            return fail(i, format!("share {share} is below {}: a cumulative share never falls", last.1));
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
            Kind::Exponential { beta } => write!(f, "beta {beta}"),
            Kind::Uniform { window } => write!(f, "uniform {window}"),
            Kind::Linear { window } => write!(f, "linear {window}"),
            Kind::LrDecay { shape, window } => write!(f, "lr-decay {shape} {window}"),
            Kind::Table { points } => write!(f, "table of {} points", points.len()),
        }
    }
}

/// A number to ten significant digits without trailing zeros: 0.15 is shown so after its round trip through gamma.
fn short(value: f64) -> String {
    let rounded: f64 = format!("{value:.9e}").parse().unwrap_or(value);
    rounded.to_string()
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Window::Steps(steps) => write!(f, "{steps}"),
            Window::Fraction(fraction) => write!(f, "{}%", short(100.0 * fraction)),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::Linear => "linear",
            Shape::Cosine => "cosine",
            Shape::OneMinusSqrt => "1-sqrt",
        })
    }
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
    fn each_is_a_cumulative_distribution() {
        for profile in all() {
            let at = 100.0;
            assert_eq!(profile.cumulative(0.0, at), 0.0);
            assert_eq!(profile.cumulative(at, at), 1.0);
            let values: Vec<f64> = (0..=1000).map(|i| profile.cumulative(f64::from(i) * 0.1, at)).collect();
            assert!(values.windows(2).all(|pair| pair[0] <= pair[1]), "{profile} falls");
        }
    }

    #[test]
    fn tracked_ones_factor_through_any_time_between() {
        for profile in all().into_iter().filter(Profile::is_trackable) {
            for (tau, s, t) in [(3.0, 10.0, 50.0), (1.0, 99.0, 100.0), (40.0, 40.0, 41.0)] {
                let product = profile.cumulative(s, t) * profile.cumulative(tau, s);
                let direct = profile.cumulative(tau, t);
                assert!((product - direct).abs() <= 1e-14 * direct, "{profile}: {product} is not {direct}");
                let gain = profile.gain(s, t);
                assert!((gain - (1.0 - profile.cumulative(s, t))).abs() < 1e-15, "{profile}");
            }
        }
    }

    #[test]
    fn gain_keeps_its_digits_late_in_training() {
        // (gamma+1)/t to first order; 1 - powf would keep seven digits of it.
        let gain = Profile::gamma(3.0).unwrap().gain(1e9 - 1.0, 1e9);
        assert!((gain - 4e-9 * (1.0 - 1.5e-9)).abs() < 1e-22, "{gain}");
    }

    #[test]
    fn standard_deviation_of_the_power_function_is_sigma_rel() {
        for sigma_rel in [0.05, 0.1, 0.2, 0.28] {
            let profile = Profile::sigma_rel(sigma_rel).unwrap();
            let n = 200_000;
            let (mut mean, mut square) = (0.0, 0.0);
            for i in 0..n {
                let (a, b) = (f64::from(i) / f64::from(n), f64::from(i + 1) / f64::from(n));
                let mass = profile.cumulative(b, 1.0) - profile.cumulative(a, 1.0);
                mean += mass * (a + b) / 2.0;
                square += mass * ((a + b) / 2.0).powi(2);
            }
            assert!(((square - mean * mean).sqrt() - sigma_rel).abs() < 1e-8);
        }
    }

    #[test]
    fn the_share_of_a_table_never_falls() {
        // Without a limit, 0.9000000000000001 at 60 would be followed by 0.9 at 61.
        let table = Profile::table(vec![(0.2, 0.29), (0.6, 0.9), (0.7, 0.9), (1.0, 1.0)]).unwrap();
        let shares: Vec<f64> = (0..=100).map(|tau| table.cumulative(f64::from(tau), 100.0)).collect();
        assert!(shares.is_sorted() && shares[60] == 0.9 && shares[100] == 1.0, "{shares:?}");
    }

    #[test]
    fn stored_forms_come_back() {
        for profile in all() {
            let text = serde_json::to_string(&profile).unwrap();
            assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), profile, "{text}");
        }
        let uniform: Profile = serde_json::from_str(r#"{"kind":"uniform","window":5000}"#).unwrap();
        assert_eq!(uniform, Profile::uniform(Window::Steps(5000.0)).unwrap());
        assert_eq!(serde_json::to_string(&uniform).unwrap(), r#"{"kind":"uniform","window":5000.0}"#);
    }

    #[test]
    fn stored_nonsense_is_refused() {
        for text in [
            r#"{"kind":"power","gamma":-1.0}"#,
            r#"{"kind":"exponential","beta":1.0}"#,
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
    fn names_are_short() {
        let names: Vec<String> = all().iter().map(ToString::to_string).collect();
        assert_eq!(names[0], "sigma_rel 0.1");
        assert_eq!(names[2], "beta 0.99");
        assert_eq!(names[4], "uniform 40");
        assert_eq!(names[9], "lr-decay 1-sqrt 50%");
    }

    #[test]
    fn windows_longer_than_the_time_are_refused() {
        let profile = Profile::uniform(Window::Steps(5000.0)).unwrap();
        assert!(profile.check_at(4999.0).is_err());
        assert!(profile.check_at(5000.0).is_ok());
    }
}
