//! The densities of planned averages, to look at.

use super::forecast::Forecast;
use super::plan::{Plan, Weight};
use super::source::IndexedSource;
use crate::error::{Error, Result};
use crate::math::{self, Densities, History};

impl Forecast {
    /// What a planned average and its target weigh over the time of training, as [`Run::densities`](crate::Run::densities).
    ///
    /// # Errors
    /// [`Error::OtherPlan`] for a plan of another forecast, those of [`Densities::new`], and as [`Forecast::plans`].
    pub fn densities(&self, plan: &Plan) -> Result<Densities> {
        let (sources, history) = self.sources()?;
        densities(sources, Some(&history), plan)
    }
}

pub(crate) fn densities(sources: Vec<IndexedSource>, history: Option<&History>, plan: &Plan) -> Result<Densities> {
    let source_of = |weight: &Weight| {
        let own = sources.iter().find(|source| (source.index, source.step) == (weight.index, weight.step));
        own.map(IndexedSource::for_solve)
            .ok_or_else(|| Error::OtherPlan { missing: format!("snapshot {}.{}", weight.index, weight.step) })
    };
    let used: Vec<math::ChainSource> = plan.weights.iter().map(source_of).collect::<Result<_>>()?;
    let weights: Vec<f64> = plan.weights.iter().map(|weight| weight.weight).collect();
    Densities::new(history, plan.at, &used, &weights, &plan.profile)
}
