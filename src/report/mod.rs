//! Tables and plots for people to read.

mod plot;
mod table;

pub use plot::plot;
pub use table::{errors, exact, measurements, number, plans, table, weights};
