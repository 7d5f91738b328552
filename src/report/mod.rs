//! Tables for people to read.

mod table;

pub use table::{errors, number, plans, table, weights};
