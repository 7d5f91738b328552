//! Tests that drive the program. They share one binary, since linking each alone would take longer than running them.

mod average;
mod averages;
mod command_line;
mod common;
mod corpus;
mod damage;
mod hostile;
mod hostile_pickles;
mod kill;
mod kill_sharded;
mod limits;
mod oracles;
mod outputs;
mod parts;
mod pictures;
mod planning;
mod python;
mod sharded_runs;
mod sweep;
mod terminal;
