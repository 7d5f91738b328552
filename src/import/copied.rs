//! Floating-point tensors that are no averages, told by their bytes: a tool copies them, and so they are the same for all
//! profiles at each step; or they never change, and rounding or arithmetic may have spoiled them.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use safetensors::Dtype;

use super::plan::{Source, Tensors};
use super::write::number_at;
use crate::error::Result;
use crate::pytorch::Checkpoint;
use crate::tensor::{TensorSpec, first_non_finite, is_averaged};

/// What is known of the tensors that are no averages.
#[derive(Debug, Default)]
pub(super) struct Copied {
    /// Taken from the newest snapshot.
    pub names: BTreeSet<String>,
    /// Of no use: NaN in every checkpoint.
    pub left_out: BTreeSet<String>,
    pub warnings: Vec<String>,
}

/// A tensor that all files of a step hold alike.
#[derive(Clone, Copy, PartialEq)]
struct TensorDigest {
    hash: blake3::Hash,
    nan: bool,
    infinite: bool,
    /// Whole numbers of 16 bits, some beyond those that are all exact.
    rounded: bool,
}

/// A tensor that has been held alike at every step so far.
struct Candidate<'a> {
    spec: &'a TensorSpec,
    key: &'a str,
    newest: Option<TensorDigest>,
    /// Whether it is the same at all steps.
    constant: bool,
}

impl Copied {
    /// Reads the newest files that tell, and of the others only what may still have been copied.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::read`].
    pub(super) fn find(sources: &[Source], tensors: &Tensors) -> Result<Copied> {
        let mut steps: BTreeMap<u64, Vec<&Source>> = BTreeMap::new();
        sources.iter().for_each(|source| steps.entry(source.stem.step).or_default().push(source));
        // After the first update all averages are alike.
        let later = |source: &Source| !source.updates.until(source.stem.step.saturating_sub(1)).is_empty();
        let tells = |of: &[&Source]| of.len() > 1 && of.iter().all(|source| later(source));
        let telling = steps.iter().filter(|(_, of)| tells(of)).map(|(&step, _)| step).next_back();
        if telling.is_none() && steps.len() < 2 {
            return Ok(Copied::default());
        }
        let mut candidates = candidates(tensors);
        let floats = candidates.len();
        let first = telling.and_then(|step| steps.remove(&step));
        for files in first.iter().chain(steps.values().rev()) {
            candidates = still(candidates, files, telling.is_none())?;
        }
        Ok(Copied::new(candidates, floats))
    }

    fn new(candidates: Vec<Candidate>, floats: usize) -> Copied {
        let names = |chosen: &dyn Fn(&Candidate, TensorDigest) -> bool| -> BTreeSet<String> {
            let chosen = candidates.iter().filter(|one| one.newest.is_some_and(|held| chosen(one, held)));
            chosen.map(|one| one.spec.name.clone()).collect()
        };
        let mut left_out = names(&|one, held| one.constant && held.nan);
        if left_out.len() == floats {
            // A training that diverged, not a constant.
            left_out.clear();
        }
        let infinite = names(&|_, held| held.infinite && !held.nan);
        let half = |name: &&str| candidates.iter().any(|one| one.spec.name == **name && one.spec.dtype == Dtype::F16);
        let infinite: Vec<&str> = infinite.iter().map(String::as_str).collect();
        let (overflown, meant): (Vec<&str>, Vec<&str>) = infinite.iter().partition(|name| half(name));
        let rounded = names(&|one, held| one.constant && held.rounded && !held.infinite);
        let moved = names(&|one, held| !one.constant && !held.nan && !held.infinite);
        let warnings = [
            (
                left_out.iter().map(String::as_str).collect::<Vec<_>>(),
                "left out: NaN in every checkpoint, which the tool makes of infinite constants such as masks; take the values \
                 from the model",
            ),
            (meant, "infinite in places and alike for all profiles: copied, not averaged"),
            (
                overflown,
                "infinite in places and alike for all profiles: copied, not averaged; in 16 bits this may be an overflow: \
                 then take the values from the model",
            ),
            (
                rounded.iter().map(String::as_str).collect(),
                "constant and whole, with numbers that 16 bits do not all hold: probably integers that the tool rounded; take \
                 the values from the model",
            ),
            (
                moved.iter().map(String::as_str).collect(),
                "alike for all profiles at every step: copied by the tool, so a synthesis takes the newest",
            ),
        ];
        let warnings = warnings.iter().filter(|(names, _)| !names.is_empty());
        Copied {
            warnings: warnings.map(|(names, what)| format!("{} {what}", each(names))).collect(),
            names: infinite.iter().map(|&name| name.to_owned()).chain(rounded).chain(moved).collect(),
            left_out,
        }
    }
}

/// "`a` is" or "`a`, `b` are": all of them, for whoever takes them from the model.
fn each(names: &[&str]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("`{}` {verb}", names.join("`, `"))
}

fn candidates(tensors: &Tensors) -> Vec<Candidate<'_>> {
    let all = tensors.specs.iter().zip(&tensors.keys);
    let may = |spec: &TensorSpec| {
        is_averaged(spec.dtype) && !tensors.counters.contains(&spec.name) && !spec.shape.contains(&0)
    };
    let all = all.filter(|(spec, _)| may(spec));
    all.map(|(spec, key)| Candidate { spec, key, newest: None, constant: true }).collect()
}

/// Those of the candidates that the files of one step hold alike; where no step tells more, only what never changes.
fn still<'a>(candidates: Vec<Candidate<'a>>, files: &[&Source], constant: bool) -> Result<Vec<Candidate<'a>>> {
    if candidates.is_empty() {
        return Ok(candidates);
    }
    let files: Vec<Checkpoint> =
        files.iter().map(|source| Checkpoint::open(&source.file.path)).collect::<Result<_>>()?;
    let one = |mut one: Candidate<'a>| {
        let Some(held) = alike(&files, one.spec, one.key)? else { return Ok(None) };
        let newest = *one.newest.get_or_insert(held);
        one.constant &= newest.hash == held.hash;
        one.newest = Some(TensorDigest {
            hash: newest.hash,
            nan: newest.nan | held.nan,
            infinite: newest.infinite | held.infinite,
            rounded: newest.rounded & held.rounded,
        });
        Ok((one.constant || !constant).then_some(one))
    };
    // One after the other: several at a time could be more than a checkpoint.
    candidates.into_iter().map(one).filter_map(Result::transpose).collect()
}

/// What all files hold, or none where they differ. At most two copies of the tensor are held.
fn alike(files: &[Checkpoint], spec: &TensorSpec, key: &str) -> Result<Option<TensorDigest>> {
    let Some((first, others)) = files.split_first() else { return Ok(None) };
    let bytes = first.read(key)?;
    for other in others {
        if other.read(key)? != bytes {
            return Ok(None);
        }
    }
    let (nan, infinite) = not_finite(spec.dtype, &bytes);
    Ok(Some(TensorDigest { hash: blake3::hash(&bytes), nan, infinite, rounded: is_rounded(spec.dtype, &bytes) }))
}

/// Whether there are NaN, and infinities.
fn not_finite(dtype: Dtype, bytes: &[u8]) -> (bool, bool) {
    let Some((first, _)) = first_non_finite(dtype, bytes) else { return (false, false) };
    let elements = bytes.len() * 8 / dtype.bitsize();
    let mut rest = (first..elements).map(|element| number_at(dtype, bytes, element));
    let infinite = rest.clone().any(f64::is_infinite);
    (rest.any(f64::is_nan), infinite)
}

/// Whether these are whole numbers of 16 bits, some beyond those that are all exact.
fn is_rounded(dtype: Dtype, bytes: &[u8]) -> bool {
    let (exact, value): (f32, fn([u8; 2]) -> f32) = match dtype {
        Dtype::F16 => (2048.0, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => (256.0, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        _ => return false,
    };
    let (elements, _) = bytes.as_chunks::<2>();
    let mut beyond = false;
    elements.iter().all(|&element| {
        let value = value(element);
        beyond |= value.abs() > exact;
        value.fract() == 0.0
    }) && beyond
}
