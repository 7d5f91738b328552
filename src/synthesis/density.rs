//! The densities of planned averages, to look at.

use super::forecast::Forecast;
use super::plan::{Plan, Weight};
use super::pool::Source;
use super::run::Run;
use crate::error::{Error, Result};
use crate::math::{self, Densities, History};

impl Run {
    /// What a planned average and its target weigh over the time of training, one span for each interval between updates.
    ///
    /// # Errors
    /// [`Error::Nothing`] for a plan of other snapshots, and those of [`Densities::new`].
    pub fn densities(&self, plan: &Plan) -> Result<Densities> {
        densities(self.sources(), self.history(), plan)
    }
}

impl Forecast {
    /// As [`Run::densities`], for a plan of this forecast.
    ///
    /// # Errors
    /// As [`Run::densities`] and [`Forecast::plans`].
    pub fn densities(&self, plan: &Plan) -> Result<Densities> {
        let (sources, history) = self.sources()?;
        densities(sources, Some(&history), plan)
    }
}

fn densities(sources: Vec<Source>, history: Option<&History>, plan: &Plan) -> Result<Densities> {
    let source_of = |weight: &Weight| {
        let own = sources.iter().find(|source| (source.index, source.step) == (weight.index, weight.step));
        own.map(Source::for_solve).ok_or_else(|| {
            Error::Nothing(format!(
                "snapshot {}.{} of the plan is not among these: plan anew",
                weight.index, weight.step
            ))
        })
    };
    let used: Vec<math::Source> = plan.weights.iter().map(source_of).collect::<Result<_>>()?;
    let weights: Vec<f64> = plan.weights.iter().map(|weight| weight.weight).collect();
    Densities::new(history, plan.at, &used, &weights, &plan.profile)
}
