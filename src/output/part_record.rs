//! Record of what all parts of an average have in common, so that parts which disagree are refused.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, listed};
use crate::synthesis::OutputPart;

/// Bytes at both ends of a source that stand for its contents. The checksums of a snapshot are among them.
const END_BYTES: u64 = 16 << 10;

/// Largest difference of two weights for which they come from one plan, relative to the largest weight.
///
/// Machines whose libraries of mathematics differ solve the same plan with other last bits.
const SAME_WEIGHT: f64 = 1e-6;

/// Source of an average: a snapshot or a checkpoint.
pub(crate) struct PartSource {
    pub name: String,
    pub files: Vec<PathBuf>,
    /// Fingerprint of the files, once they were read.
    fingerprint: OnceCell<String>,
}

impl PartSource {
    pub fn new(name: String, files: Vec<PathBuf>) -> PartSource {
        PartSource { name, files, fingerprint: OnceCell::new() }
    }

    /// Returns a fingerprint of the files: of their lengths and both ends. Reads them once.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let mut hasher = blake3::Hasher::new();
        for path in &self.files {
            let mut read = || {
                let mut file = File::open(path)?;
                let length = file.metadata()?.len();
                hasher.update(&length.to_le_bytes());
                for start in [0, length.saturating_sub(END_BYTES)] {
                    file.seek(SeekFrom::Start(start))?;
                    let mut bytes = Vec::new();
                    (&file).take(END_BYTES).read_to_end(&mut bytes)?;
                    hasher.update(&bytes);
                }
                std::io::Result::Ok(())
            };
            read().map_err(Error::io("read", path))?;
        }
        let found = hasher.finalize().to_hex()[..16].to_owned();
        Ok(self.fingerprint.get_or_init(|| found).clone())
    }
}

/// Record beside the unfinished files of an average: what all parts must have in common, and the weights to use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct PartRecord {
    pub parts: usize,
    /// Names and values that must be equal, in the order in which they are compared.
    pub settings: Vec<(String, String)>,
    /// Bits of the weights that the first process computed. All others use them.
    weights: Vec<u64>,
}

impl PartRecord {
    pub(super) fn new(part: OutputPart, settings: Vec<(String, String)>, weights: &[f64]) -> PartRecord {
        PartRecord { parts: part.count(), settings, weights: weights.iter().map(|weight| weight.to_bits()).collect() }
    }

    /// Returns the weights to blend with.
    pub(super) fn weights(&self) -> Vec<f64> {
        self.weights.iter().map(|&bits| f64::from_bits(bits)).collect()
    }

    /// Parses a record.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if it is damaged.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<PartRecord> {
        let remedy = "remove the folder that it is in, and start all parts again";
        let wrong = |why| Error::unexpected(path, format!("the record of the parts is damaged ({why}): {remedy}"));
        serde_json::from_slice(bytes).map_err(wrong)
    }

    /// Checks that another part, which is starting, writes the same averages. `folder` is named in the error.
    ///
    /// # Errors
    /// [`Error::Unexpected`] with the first difference.
    pub(super) fn check(&self, other: &PartRecord, folder: &Path) -> Result<()> {
        let differ = |what: &str, recorded: &str, own: &str| {
            let why = format!(
                "parts of one average differ in {what}: those before have {recorded}, this one has {own}. Give all \
                 parts the same sources and options, with the step of the targets (--at) while a training goes on; or \
                 remove this folder and start all parts again"
            );
            Err(Error::unexpected(folder, why))
        };
        if self.parts != other.parts {
            return differ("their number", &format!("K/{}", self.parts), &format!("K/{}", other.parts));
        }
        for ((what, recorded), (own_name, own)) in self.settings.iter().zip(&other.settings) {
            if what != own_name {
                return differ("their sources and files", &format!("{what} {recorded}"), &format!("{own_name} {own}"));
            }
            if recorded != own {
                return differ(what, recorded, own);
            }
        }
        if self.settings.len() != other.settings.len() {
            let more = |record: &PartRecord| record.settings.len().to_string();
            return differ("the number of their sources and files", &more(self), &more(other));
        }
        let [recorded, own] = [self, other].map(PartRecord::weights);
        let largest = recorded.iter().fold(0.0f64, |largest, weight| largest.max(weight.abs()));
        let is_same = |(recorded, own): (&f64, &f64)| (recorded - own).abs() <= SAME_WEIGHT * largest;
        if recorded.len() != own.len() || !recorded.iter().zip(&own).all(is_same) {
            let text = |weights: &[f64]| listed(&weights.iter().map(f64::to_string).collect::<Vec<_>>());
            return differ("the weights of their sources", &text(&recorded), &text(&own));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(parts: usize, target: &str, weights: &[f64]) -> PartRecord {
        let settings = vec![("the target".to_owned(), target.to_owned())];
        PartRecord::new(OutputPart::new(1, parts).unwrap(), settings, weights)
    }

    #[test]
    fn last_bits_of_weights_may_differ() {
        let first = record(2, "a", &[0.25, 0.75]);
        let folder = Path::new("folder");
        first.check(&record(2, "a", &[0.25, 0.75 * (1.0 + f64::EPSILON)]), folder).unwrap();
        let reread = PartRecord::parse(folder, &serde_json::to_vec(&first).unwrap()).unwrap();
        assert_eq!(reread.weights(), [0.25, 0.75]);
        for (other, expected) in [
            (record(3, "a", &[0.25, 0.75]), "differ in their number: those before have K/2, this one has K/3"),
            (record(2, "b", &[0.25, 0.75]), "differ in the target: those before have a, this one has b"),
            (record(2, "a", &[0.26, 0.74]), "differ in the weights of their sources"),
            (record(2, "a", &[1.0]), "differ in the weights of their sources"),
            (record(2, "a", &[0.25, f64::NAN]), "differ in the weights of their sources"),
        ] {
            let text = first.check(&other, folder).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("folder: ") && text.contains("--at"), "{text}");
        }
        assert!(PartRecord::parse(folder, b"{").unwrap_err().to_string().contains("start all parts again"));
    }
}
