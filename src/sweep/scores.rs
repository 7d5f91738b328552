//! Values that one evaluation returns.

use serde::{Deserialize, Serialize};

/// Values that one evaluation measured: one of each metric, or several of each.
///
/// `From<f64>` is for one metric, `From<Vec<f64>>` for one value of each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scores(Vec<Vec<f64>>);

impl Scores {
    /// Takes rows with a value of each metric.
    pub fn of_rows(rows: Vec<Vec<f64>>) -> Scores {
        Scores(rows)
    }

    /// Iterates over the values of a metric.
    pub(super) fn values(&self, metric: usize) -> impl Iterator<Item = f64> {
        self.0.iter().filter_map(move |row| row.get(metric).copied())
    }

    /// Returns true for one value of one metric.
    pub(super) fn is_single(&self) -> bool {
        matches!(&self.0[..], [row] if row.len() == 1)
    }

    /// Checks that there is a finite value of each metric in each row.
    ///
    /// # Errors
    /// Returns the reason.
    pub(super) fn checked(self, metrics: &[String]) -> Result<Scores, String> {
        if self.0.is_empty() {
            return Err("it measured nothing".into());
        }
        for row in &self.0 {
            if row.len() != metrics.len() {
                let (found, wanted) = (row.len(), metrics.len());
                return Err(format!("it returned {found} values for {wanted} metrics ({})", metrics.join(", ")));
            }
            if let Some((name, value)) = metrics.iter().zip(row).find(|(_, value)| !value.is_finite()) {
                return Err(format!("the {name} is {value}: a finite number is needed"));
            }
        }
        Ok(self)
    }
}

impl From<f64> for Scores {
    fn from(score: f64) -> Scores {
        Scores(vec![vec![score]])
    }
}

impl From<Vec<f64>> for Scores {
    fn from(row: Vec<f64>) -> Scores {
        Scores(vec![row])
    }
}
