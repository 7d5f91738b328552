#![no_main]

#[path = "../../cli/tests/program/oracles/mod.rs"]
mod oracles;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| oracles::weights::check_file(bytes));
