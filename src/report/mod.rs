//! Tables and plots for people to read.

mod plot;
mod table;

pub use plot::plot;
pub use table::{checkpoint_weights, errors, exact, measurements, merges, number, plans, table, weights};
