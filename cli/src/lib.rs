//! The command line `posthoc-ema`: arguments in, calls to the library, tables, pictures or JSON out.

pub mod bench;
mod commands;
pub mod report;

pub use commands::run;
