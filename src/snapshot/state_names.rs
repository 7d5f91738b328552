//! Names of the files of live states.

use super::STATE_FILE;
use super::id::PartNumber;

/// Beginning of the names of part files of a live state.
const STATE: &str = "state-";

/// Beginning of the names of part files of a live state that is saved into a folder of the caller's.
const SAVED_STATE: &str = "posthoc-ema-";

/// Returns the name of part file `i` of `n`, counted from 1, of the live state at a step.
pub(crate) fn state_part_name(step: u64, i: usize, n: usize) -> String {
    format!("{STATE}{step}-{}.safetensors", PartNumber { i, n })
}

/// Returns the name of part file `i` of `n`, counted from 1, of a live state in a folder of the caller's.
pub(crate) fn saved_part_name(i: usize, n: usize) -> String {
    format!("{SAVED_STATE}{}.safetensors", PartNumber { i, n })
}

/// Parses the name of a part file of a live state: step, and number.
pub(crate) fn parse_state_part(name: &str) -> Option<(u64, PartNumber)> {
    let (step, part) = name.strip_prefix(STATE)?.strip_suffix(".safetensors")?.split_once('-')?;
    let (step, part) = (step.parse().ok()?, PartNumber::parse(part)?);
    (state_part_name(step, part.i, part.n) == name).then_some((step, part))
}

/// Parses the name of a part file of a live state in a folder of the caller's.
pub(super) fn parse_saved_part(name: &str) -> Option<PartNumber> {
    PartNumber::parse(name.strip_prefix(SAVED_STATE)?.strip_suffix(".safetensors")?)
}

/// Returns true for the name of a file of a live state in a run.
pub(super) fn is_state(name: &str) -> bool {
    name == STATE_FILE || parse_state_part(name).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_names_of_states_parse() {
        let part = PartNumber { i: 2, n: 40 };
        assert_eq!(parse_state_part("state-700-part-00002-of-00040.safetensors"), Some((700, part)));
        assert_eq!(parse_saved_part("posthoc-ema-part-00002-of-00040.safetensors"), Some(part));
        for other in ["state.safetensors", "state-7.safetensors", "state-07-part-00001-of-00001.safetensors"] {
            assert_eq!(parse_state_part(other), None, "{other}");
        }
    }
}
