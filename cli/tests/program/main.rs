//! Tests that drive the program, in one binary: linking each alone would take longer than running them.

mod average;
mod command_line;
mod common;
mod corpus;
mod damage;
mod hostile;
mod kill;
mod oracles;
mod pictures;
mod planning;
mod python;
mod sweep;
