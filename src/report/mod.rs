//! Tables and plots for people to read.

mod plot;
mod table;

pub use comfy_table::Table;
pub use plot::plot;
pub use table::{errors, exact, measurements, number, plans, predicted, predicted_header, table, weights};
