//! Output folder of the example.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Text of the file that marks a folder whose output `--force` may replace.
const MARK: &str = "Output of the example `digits` of posthoc-ema-candle, which `--force` replaces.\n";

/// Folder of all output.
pub struct Folder(PathBuf);

impl Folder {
    /// Creates the folder, and removes the output of an earlier run if `force` is set.
    ///
    /// # Errors
    /// If there is earlier output without `force`, or if another program has written it.
    pub fn prepare(root: &Path, force: bool) -> Result<Self> {
        let folder = Self(root.to_owned());
        let earlier = folder.earlier()?;
        if let Some(found) = earlier.first() {
            let found = found.display();
            ensure!(force, "{found} exists already: give --force to replace it, or --out for another folder");
            let ours = folder.mark().is_file();
            ensure!(
                ours,
                "{found} was not written by this example and is not replaced: choose another folder with --out"
            );
        }
        for file in &earlier {
            fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        let averages = folder.averages();
        let mark = folder.mark();
        fs::create_dir_all(&averages).with_context(|| format!("cannot create {}", averages.display()))?;
        fs::write(&mark, MARK).with_context(|| format!("cannot write {}", mark.display()))?;
        Ok(folder)
    }

    /// Returns the directory of the run to synthesize from.
    pub fn run(&self) -> PathBuf {
        self.0.join("ema")
    }

    /// Returns the directory of the averages that are tracked for comparison.
    pub fn direct(&self) -> PathBuf {
        self.0.join("direct")
    }

    /// Returns the file of one synthesized average.
    pub fn average(&self, sigma_rel: f64) -> PathBuf {
        self.averages().join(format!("sigma_rel-{sigma_rel:.4}.safetensors"))
    }

    pub fn chart(&self) -> PathBuf {
        self.0.join("loss.svg")
    }

    pub fn sheet(&self) -> PathBuf {
        self.0.join("digits.png")
    }

    fn mark(&self) -> PathBuf {
        self.0.join("digits.txt")
    }

    fn averages(&self) -> PathBuf {
        self.0.join("averages")
    }

    /// Lists the existing files that have names of this example's output.
    fn earlier(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for dir in [self.run(), self.direct()] {
            found.extend(files(&dir)?.into_iter().filter(|path| is_of_run(path)));
        }
        found.extend(files(&self.averages())?.into_iter().filter(|path| is_average(path)));
        found.extend([self.chart(), self.sheet()].into_iter().filter(|path| path.exists()));
        Ok(found)
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "loss over length  {}", self.chart().display())?;
        writeln!(f, "digits            {}", self.sheet().display())?;
        writeln!(f, "averages          {}", self.averages().display())?;
        write!(f, "run               {}", self.run().display())
    }
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.with_context(|| format!("cannot list {}", dir.display()))?.path());
    }
    files.sort();
    Ok(files)
}

/// Returns true for a snapshot, such as `0.1000.safetensors`, and for the live state.
fn is_of_run(path: &Path) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some(stem) = stem(path) else { return false };
    stem == "state" || stem.split_once('.').is_some_and(|(index, step)| is_number(index) && is_number(step))
}

fn is_average(path: &Path) -> bool {
    stem(path).is_some_and(|stem| stem.starts_with("sigma_rel-"))
}

fn stem(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_suffix(".safetensors")
}
