//! Pictures as SVG or PNG files.
//!
//! They are drawn for a column of a paper: few lines, letters that stay legible at two thirds of their size, and
//! colours that differ in grey.

mod axis;
mod bench;
mod canvas;
mod errors;
mod file;
mod profiles;
mod rounding;
mod sweep;
mod timeline;

pub use bench::draw_measurements;
pub use errors::{ErrorCurve, ErrorPoint, draw_error_curve, error_curve_png, error_grid};
pub use file::Format;
pub use profiles::{MAX_PANELS, ProfilePanel, Profiles, draw_profiles};
pub use rounding::Rounding;
pub use sweep::{SweepCurve, SweepPoint, draw_sweep, sweep_png};
pub use timeline::{Timeline, TimelineRow, draw_timeline};
