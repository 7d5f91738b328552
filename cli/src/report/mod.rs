//! Tables and pictures for people to read.
//!
//! Pictures are SVG, or PNG where a file's name ends so. They are drawn for a column of a paper: few lines, letters that
//! stay legible at two thirds of their size, and colours that differ in grey.

mod axis;
mod bench;
mod canvas;
mod errors;
mod file;
mod profiles;
mod rounding;
mod sweep;
mod table;
mod timeline;
mod trials;

pub use bench::bench;
pub use comfy_table::Table;
pub use errors::{ErrorCurve, ErrorPoint, error_curve, error_grid};
pub use file::Format;
pub use profiles::{MAX_PANELS, ProfilePanel, Profiles, profiles};
pub use rounding::Rounding;
pub use sweep::{SweepCurve, SweepPoint, sweep_curve};
pub use table::{
    advice, checkpoint_weights, errors, exact, length_name, lengths, measurements, merges, number, plans, predicted,
    predicted_header, table, weights,
};
pub use timeline::{Timeline, TimelineRow, timeline};
pub use trials::trials;
