//! Families of profiles that differ only in their length.

use super::{Kind, Profile, Shape, Window};
use crate::error::Result;
use crate::math::conversion::gamma_to_sigma_rel;

/// All profiles of one kind, which differ only in their length.
///
/// The length of a power function is its relative standard deviation, that of an exponential its half-life. The length
/// of other profiles is their window, in steps or as a share of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Power functions, by `sigma_rel`.
    Power,
    /// Exponentials, by half-life in steps.
    Exponential,
    /// Plain means.
    Uniform(Unit),
    /// Linearly growing weights.
    Linear(Unit),
    /// Averages that replace the decay of a learning rate.
    LrDecay(Shape, Unit),
}

/// Unit of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Steps.
    Steps,
    /// Shares of the target time.
    Fraction,
}

impl Profile {
    /// Returns the family and the length within it; `None` for a table.
    pub fn family(&self) -> Option<(Family, f64)> {
        match &self.0 {
            Kind::Power { gamma } => Some((Family::Power, gamma_to_sigma_rel(*gamma))),
            Kind::Exponential { decay } => Some((Family::Exponential, decay.half_life())),
            Kind::Uniform { window } => Some((Family::Uniform(window.unit()), window.length())),
            Kind::Linear { window } => Some((Family::Linear(window.unit()), window.length())),
            Kind::LrDecay { shape, window } => Some((Family::LrDecay(*shape, window.unit()), window.length())),
            Kind::Table { .. } => None,
        }
    }
}

impl Family {
    /// Returns the profile of this length.
    ///
    /// # Errors
    /// As the constructors of [`Profile`], for a length outside of the family.
    pub fn profile(self, length: f64) -> Result<Profile> {
        match self {
            Family::Power => Profile::sigma_rel(length),
            Family::Exponential => Profile::half_life(length),
            Family::Uniform(unit) => Profile::uniform(unit.window(length)),
            Family::Linear(unit) => Profile::linear(unit.window(length)),
            Family::LrDecay(shape, unit) => Profile::lr_decay(shape, unit.window(length)),
        }
    }

    /// Returns the name of a length: `sigma_rel`, `half_life`, `window` or `fraction`.
    pub fn length_name(self) -> &'static str {
        match self {
            Family::Power => "sigma_rel",
            Family::Exponential => "half_life",
            Family::Uniform(unit) | Family::Linear(unit) | Family::LrDecay(_, unit) => unit.name(),
        }
    }

    /// Returns the coordinate of a length in a search: `sigma_rel` itself, and the logarithm of other lengths, which
    /// span orders of magnitude.
    pub fn coordinate(self, length: f64) -> f64 {
        if self == Family::Power { length } else { length.ln() }
    }

    /// Inverts [`Family::coordinate`].
    pub fn length_at(self, coordinate: f64) -> f64 {
        if self == Family::Power { coordinate } else { coordinate.exp() }
    }
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Steps => "window",
            Unit::Fraction => "fraction",
        }
    }

    fn window(self, length: f64) -> Window {
        match self {
            Unit::Steps => Window::Steps(length),
            Unit::Fraction => Window::Fraction(length),
        }
    }
}

impl Window {
    fn unit(self) -> Unit {
        match self {
            Window::Steps(_) => Unit::Steps,
            Window::Fraction(_) => Unit::Fraction,
        }
    }

    fn length(self) -> f64 {
        match self {
            Window::Steps(length) | Window::Fraction(length) => length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_and_length_restore_the_profile() {
        let steps = Window::Steps(5000.0);
        let share = Window::Fraction(0.2);
        for (profile, name, length) in [
            (Profile::sigma_rel(0.15), "sigma_rel", 0.15),
            (Profile::half_life(700.0), "half_life", 700.0),
            (Profile::uniform(steps), "window", 5000.0),
            (Profile::uniform(share), "fraction", 0.2),
            (Profile::linear(share), "fraction", 0.2),
            (Profile::lr_decay(Shape::Cosine, steps), "window", 5000.0),
        ] {
            let profile = profile.unwrap();
            let (family, found) = profile.family().unwrap();
            assert_eq!(family.length_name(), name);
            assert!((found - length).abs() <= 1e-15 * length, "{profile}: {found}");
            let restored = family.profile(found).unwrap();
            assert_eq!(restored.family().unwrap().0, family);
            let coordinate = family.coordinate(length);
            assert!(coordinate < family.coordinate(2.0 * length));
            assert!((family.length_at(coordinate) - length).abs() <= 1e-14 * length);
        }
        assert_eq!(Profile::table(vec![(0.5, 0.1), (1.0, 1.0)]).unwrap().family(), None);
        let family = |profile: Result<Profile>| profile.unwrap().family().unwrap().0;
        assert_ne!(family(Profile::uniform(steps)), family(Profile::uniform(share)));
        assert_ne!(family(Profile::lr_decay(Shape::Cosine, steps)), family(Profile::lr_decay(Shape::Linear, steps)));
    }
}
