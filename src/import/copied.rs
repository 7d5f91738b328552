//! Floating-point tensors that a tool copied instead of averaging, found by their bytes.
//!
//! A copied tensor is the same for all profiles at each step. The same pass finds constants that rounding or arithmetic
//! spoiled.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use safetensors::Dtype;

use super::messages::join_all_names;
use super::planned::PlannedSnapshot;
use super::tensors::ImportTensors;
use crate::error::Result;
use crate::pytorch::{self, Checkpoint, Number};
use crate::tensor::{ScatteredElements, TensorSpec, first_non_finite, for_each_piece, is_averaged};

/// Tensors that are not averages.
#[derive(Debug, Default)]
pub(super) struct Copied {
    /// Tensors that a synthesis takes from the newest snapshot.
    pub names: BTreeSet<String>,
    /// Useless tensors: NaN in every checkpoint.
    pub left_out: BTreeSet<String>,
    pub warnings: Vec<String>,
}

impl Copied {
    /// Reads the newest step at which averages of different profiles must differ, and of the other steps only the
    /// tensors that may still have been copied.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::read`].
    pub(super) fn find(snapshots: &[PlannedSnapshot], tensors: &ImportTensors) -> Result<Copied> {
        let mut steps: BTreeMap<u64, Vec<&PlannedSnapshot>> = BTreeMap::new();
        for snapshot in snapshots {
            steps.entry(snapshot.id.step).or_default().push(snapshot);
        }
        let distinguishing = newest_distinguishing_step(&steps);
        if distinguishing.is_none() && steps.len() < 2 {
            return Ok(Copied::default());
        }
        let constants_only = distinguishing.is_none();
        let mut candidates = CopyCandidate::all(tensors);
        let floats = candidates.len();
        let first = distinguishing.and_then(|step| steps.remove(&step));
        for files in first.iter().chain(steps.values().rev()) {
            candidates = retain_identical(candidates, files, constants_only)?;
        }
        Ok(Copied::classify(&candidates, floats))
    }

    /// Sorts the candidates that remain by their kind. `floats` is the number of floating-point tensors.
    fn classify(candidates: &[CopyCandidate], floats: usize) -> Copied {
        let mut copied = Copied::default();
        for kind in CopyKind::ALL {
            let names: Vec<&str> =
                candidates.iter().filter(|one| one.kind() == Some(kind)).map(|one| one.spec.name.as_str()).collect();
            // If every tensor is NaN, the training diverged.
            if names.is_empty() || (kind == CopyKind::Nan && names.len() == floats) {
                continue;
            }
            copied.warnings.push(format!("{} {}", join_all_names(&names), kind.warning()));
            let group = if kind == CopyKind::Nan { &mut copied.left_out } else { &mut copied.names };
            group.extend(names.into_iter().map(str::to_owned));
        }
        copied
    }
}

/// Returns the newest step at which several profiles have averages of more than one update.
fn newest_distinguishing_step(steps: &BTreeMap<u64, Vec<&PlannedSnapshot>>) -> Option<u64> {
    let mut newest_first = steps.iter().rev();
    let (step, _) =
        newest_first.find(|(_, files)| files.len() > 1 && files.iter().all(|file| file.follows_other_updates()))?;
    Some(*step)
}

/// Kinds of tensors that are not averages, in the order of their warnings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CopyKind {
    /// Constant, with NaN.
    Nan,
    /// With infinities.
    Infinite,
    /// With infinities in f16, whose range is small.
    Overflow,
    /// Constant whole numbers, rounded to 16 bits.
    RoundedIntegers,
    /// Changing from step to step.
    Changing,
}

impl CopyKind {
    const ALL: [CopyKind; 5] =
        [CopyKind::Nan, CopyKind::Infinite, CopyKind::Overflow, CopyKind::RoundedIntegers, CopyKind::Changing];

    /// Returns the predicate of a warning, after the names and their verb.
    fn warning(self) -> &'static str {
        match self {
            CopyKind::Nan => {
                "left out: NaN in every checkpoint, which the tool makes of infinite constants such as masks; take the \
                 values from the model"
            }
            CopyKind::Infinite => "infinite in places and alike for all profiles: copied, not averaged",
            CopyKind::Overflow => {
                "infinite in places and alike for all profiles: copied, not averaged; in 16 bits this may be an \
                 overflow: then take the values from the model"
            }
            CopyKind::RoundedIntegers => {
                "constant and whole, with numbers that 16 bits do not all hold: probably integers that the tool \
                 rounded; take the values from the model"
            }
            CopyKind::Changing => {
                "alike for all profiles at every step: copied by the tool, so a synthesis takes the newest"
            }
        }
    }
}

/// Tensor that is identical in all files of each step read so far.
struct CopyCandidate<'a> {
    spec: &'a TensorSpec,
    key: &'a str,
    /// Digest of all steps read so far, with the hash of the first.
    digest: Option<TensorDigest>,
    /// True if the hash is the same at all steps.
    constant: bool,
}

impl<'a> CopyCandidate<'a> {
    /// Returns a candidate for each floating-point tensor that is neither empty nor a counter.
    fn all(tensors: &'a ImportTensors) -> Vec<CopyCandidate<'a>> {
        let mut candidates = Vec::new();
        for (spec, key) in tensors.iter() {
            if is_averaged(spec.dtype) && !tensors.counters.contains(&spec.name) && !spec.shape.contains(&0) {
                candidates.push(CopyCandidate { spec, key, digest: None, constant: true });
            }
        }
        candidates
    }

    fn add(&mut self, other: TensorDigest) {
        let Some(digest) = &mut self.digest else {
            self.digest = Some(other);
            return;
        };
        self.constant &= digest.hash == other.hash;
        digest.nan |= other.nan;
        digest.infinite |= other.infinite;
        digest.rounded_integers &= other.rounded_integers;
    }

    /// Returns the kind of the tensor; `None` if it is to be averaged like any other.
    fn kind(&self) -> Option<CopyKind> {
        let digest = self.digest?;
        if digest.nan {
            self.constant.then_some(CopyKind::Nan)
        } else if digest.infinite {
            Some(if self.spec.dtype == Dtype::F16 { CopyKind::Overflow } else { CopyKind::Infinite })
        } else if !self.constant {
            Some(CopyKind::Changing)
        } else {
            digest.rounded_integers.then_some(CopyKind::RoundedIntegers)
        }
    }
}

/// Retains the candidates that are identical in all files of one step; with `constants_only`, only those that have not
/// changed since the first step read.
fn retain_identical<'a>(
    candidates: Vec<CopyCandidate<'a>>,
    files: &[&PlannedSnapshot],
    constants_only: bool,
) -> Result<Vec<CopyCandidate<'a>>> {
    if candidates.is_empty() {
        return Ok(candidates);
    }
    let files: Vec<Checkpoint> =
        files.iter().map(|snapshot| Checkpoint::open(&snapshot.file.path)).collect::<Result<_>>()?;
    let mut retained = Vec::with_capacity(candidates.len());
    for mut candidate in candidates {
        let Some(digest) = TensorDigest::of_identical(&files, candidate.spec.dtype, candidate.key) else { continue };
        candidate.add(digest);
        if candidate.constant || !constants_only {
            retained.push(candidate);
        }
    }
    Ok(retained)
}

/// Digest of a tensor's elements.
#[derive(Clone, Copy)]
struct TensorDigest {
    hash: blake3::Hash,
    nan: bool,
    infinite: bool,
    rounded_integers: bool,
}

impl TensorDigest {
    /// Returns the digest of a tensor that is identical in all files; `None` if it is not.
    fn of_identical(files: &[Checkpoint], dtype: Dtype, key: &str) -> Option<TensorDigest> {
        let (first, others) = files.split_first()?;
        let is_same = |other: &Checkpoint| other.equals(first, key);
        others.iter().all(is_same).then(|| TensorDigest::new(dtype, first.scattered(key)))?
    }

    /// Reads a tensor piece by piece.
    fn new(dtype: Dtype, elements: Option<&dyn ScatteredElements>) -> Option<TensorDigest> {
        let mut hasher = blake3::Hasher::new();
        let [mut nan, mut infinite, mut beyond] = [false; 3];
        let mut whole = true;
        for_each_piece(elements?, &mut |bytes| {
            hasher.update(bytes);
            let integers = if whole { integers_beyond(dtype, bytes) } else { None };
            whole = integers.is_some();
            beyond |= integers.unwrap_or(false);
            let size = dtype.bitsize() / 8;
            let first = first_non_finite(dtype, bytes).map_or(bytes.len(), |(first, _)| first * size);
            for element in bytes[first..].chunks_exact(size) {
                if let Some(Number::Rounded(value, _)) = pytorch::number(dtype, element) {
                    nan |= value.is_nan();
                    infinite |= value.is_infinite();
                }
            }
        });
        Some(TensorDigest { hash: hasher.finalize(), nan, infinite, rounded_integers: whole && beyond })
    }
}

/// Looks for whole numbers beyond the range in which all are exact, in a dtype of 16 bits. Returns `None` if not all
/// elements are whole.
fn integers_beyond(dtype: Dtype, bytes: &[u8]) -> Option<bool> {
    let (value, exact): (fn([u8; 2]) -> f32, f32) = match dtype {
        Dtype::F16 => (|bytes| f16::from_le_bytes(bytes).to_f32(), 2048.0),
        Dtype::BF16 => (|bytes| bf16::from_le_bytes(bytes).to_f32(), 256.0),
        _ => return None,
    };
    let (elements, _) = bytes.as_chunks::<2>();
    let mut beyond = false;
    for &element in elements {
        let value = value(element);
        if value.fract() != 0.0 {
            return None;
        }
        beyond |= value.abs() > exact;
    }
    Some(beyond)
}
