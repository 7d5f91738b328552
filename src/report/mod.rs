//! Tables for people to read.

mod table;

pub use table::{errors, exact, number, plans, table, weights};
