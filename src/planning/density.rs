//! Densities of planned averages, for plots.

use super::forecast::Forecast;
use super::plan::{Plan, Weight};
use super::source::IndexedSource;
use crate::error::{Error, Result};
use crate::math::{ChainSource, Densities, History};

impl Forecast {
    /// Returns the densities of a planned average and its target, as [`Run::densities`](crate::Run::densities).
    ///
    /// # Errors
    /// [`Error::OtherPlan`] for a plan of another forecast, those of [`Densities::new`], and as [`Forecast::plans`].
    pub fn densities(&self, plan: &Plan) -> Result<Densities> {
        let (sources, history) = self.sources()?;
        densities(sources, Some(&history), plan)
    }
}

pub(crate) fn densities(sources: Vec<IndexedSource>, history: Option<&History>, plan: &Plan) -> Result<Densities> {
    let mut used: Vec<ChainSource> = Vec::with_capacity(plan.weights.len());
    for Weight { index, step, .. } in &plan.weights {
        let source = sources.iter().find(|source| source.index == *index && source.step == *step);
        let source = source.ok_or_else(|| Error::OtherPlan { missing: format!("snapshot {index}.{step}") })?;
        used.push(source.to_chain_source());
    }
    let weights: Vec<f64> = plan.weights.iter().map(|weight| weight.weight).collect();
    Densities::new(history, plan.at, &used, &weights, &plan.profile)
}
