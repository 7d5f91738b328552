//! Tables and plots for people to read.

mod plot;
mod table;
mod trials;

pub use plot::plot;
pub use table::{errors, exact, measurements, number, plans, table, weights};
pub use trials::trials;
