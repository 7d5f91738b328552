//! The options `-o` and `--out-dir`: checked before any work. `-o -` is standard output.

use std::path::{Path, PathBuf};

use clap::builder::{PathBufValueParser, TypedValueParser};
use posthoc_ema::Error;
use posthoc_ema::fs::{Stream, check_output};

use super::output::{print, print_report};
use super::{Failure, Outcome};

/// Path of standard output.
const STDOUT: &str = "/dev/stdout";

/// Parses the path of an output, where `-` is standard output.
pub fn output_parser() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().map(|path| if path.as_os_str() == "-" { STDOUT.into() } else { path })
}

/// Place that averages are written to.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    /// File or folder of the only target.
    pub output: Option<&'a Path>,
    /// Directory of a file or folder for each target.
    pub out_dir: Option<&'a Path>,
}

impl Destination<'_> {
    /// Checks that it can be written, before any work. `json` is true if a document is printed to standard output.
    pub fn check(self, json: bool) -> Outcome {
        if let Some(path) = self.output {
            if json && self.is_stdout() {
                let why = "-o - and --json both write to standard output: give -o FILE, or leave out --json";
                return Err(Failure::Usage(why.into()));
            }
            // A folder becomes a folder again, if it is empty.
            if !path.is_dir() {
                check_output(path)?;
            }
        }
        match self.out_dir {
            Some(dir) if dir.exists() && !dir.is_dir() => {
                Err(Error::unexpected(dir, "this is not a directory: name a directory, or a new one").into())
            }
            _ => Ok(()),
        }
    }

    /// Prints what was written: to standard error if the average itself went to standard output.
    pub fn print(self, text: &str) {
        if self.is_stdout() { print_report(text) } else { print(text) }
    }

    fn is_stdout(self) -> bool {
        self.output.is_some_and(Stream::is_stdout)
    }
}
