//! Profiles and chains as JSON strings in a snapshot's metadata.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::math::{Chain, EmaChain, EmaDecay, History, Profile, Ramp};
use crate::snapshot::Snapshot;

/// The metadata's `history` of another tool's chain: the updates and the rule of their decays.
#[derive(Serialize, Deserialize)]
struct ForeignHistory {
    updates: History,
    decay: StoredDecay,
}

/// Rule of the decays of another tool's chain.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum StoredDecay {
    /// [`Chain::Counter`]; its `gamma` is that of the stored profile.
    Counter { stride: u64, offset: u64 },
    /// [`Chain::CorrectedCounter`]; its `gamma` is that of the stored profile.
    ///
    /// It is a kind of its own, so that a reader that does not know it cannot take it for a plain counter.
    CorrectedCounter { stride: u64, offset: u64 },
    /// [`Chain::Ema`].
    Ema { start: u64, every: u64, beta: f64, floor: f64, ramp: Ramp },
}

impl StoredDecay {
    /// Returns the chain of an average of a profile.
    ///
    /// # Errors
    /// The reason why there is none.
    fn chain(self, profile: &Profile) -> std::result::Result<Chain, String> {
        match self {
            StoredDecay::Counter { stride, offset } => {
                Ok(Chain::Counter { gamma: counted_gamma(profile, stride)?, stride, offset })
            }
            StoredDecay::CorrectedCounter { stride, offset } => {
                Ok(Chain::CorrectedCounter { gamma: counted_gamma(profile, stride)?, stride, offset })
            }
            StoredDecay::Ema { start, every, beta, floor, ramp } => {
                let decay = EmaDecay { beta, floor, ramp };
                decay.check().map_err(|why| format!("has a wrong decay: {why}"))?;
                if every == 0 {
                    return Err("has an EMA that is updated every 0 steps: `every` must be above 0".into());
                }
                Ok(Chain::Ema(EmaChain { decay, start, every }))
            }
        }
    }
}

/// Returns the `gamma` of a chain by a counter.
fn counted_gamma(profile: &Profile, stride: u64) -> std::result::Result<f64, String> {
    profile.as_gamma().filter(|_| stride > 0).ok_or_else(|| {
        format!(
            "has a decay by a counter, which needs a power-function profile and a stride above 0; the profile is \
             {profile}"
        )
    })
}

/// Returns the metadata string of a profile.
pub(crate) fn profile_json(profile: &Profile) -> String {
    serde_json::json!(profile).to_string()
}

/// Returns the metadata string of a chain's updates: a list, with the rule of the decays if they follow a counter.
#[cfg(feature = "pytorch")]
pub(crate) fn history_json(chain: &Chain, updates: History) -> String {
    let decay = match *chain {
        Chain::Counter { stride, offset, .. } => StoredDecay::Counter { stride, offset },
        Chain::CorrectedCounter { stride, offset, .. } => StoredDecay::CorrectedCounter { stride, offset },
        Chain::Ema(EmaChain { decay: EmaDecay { beta, floor, ramp }, start, every }) => {
            StoredDecay::Ema { start, every, beta, floor, ramp }
        }
        Chain::Tracked(_) | Chain::Raw => return serde_json::json!(updates).to_string(),
    };
    serde_json::json!(ForeignHistory { updates, decay }).to_string()
}

/// Returns the profile, chain and updates of a snapshot; no updates if it has no history.
///
/// # Errors
/// [`Error::Damaged`] for metadata that is invalid or inconsistent.
pub(crate) fn read_chain(snapshot: &Snapshot) -> Result<(Profile, Chain, Option<History>)> {
    let invalid = |key: &str, error: serde_json::Error| {
        Error::damaged(snapshot.path(), format!("the metadata's `{key}` cannot be parsed: {error}"))
    };
    let profile: Profile = serde_json::from_str(&snapshot.meta.profile).map_err(|e| invalid("profile", e))?;
    if !profile.is_trackable() {
        let why = format!("the metadata's `profile` is {profile}, which no running average can track");
        return Err(Error::damaged(snapshot.path(), why));
    }
    let Some(history) = &snapshot.meta.history else {
        return Ok((profile.clone(), Chain::Tracked(profile), None));
    };
    // The history of a tracked chain is a plain list of updates.
    let (chain, updates) = if history.trim_start().starts_with('[') {
        let updates = serde_json::from_str(history).map_err(|e| invalid("history", e))?;
        (Chain::Tracked(profile.clone()), updates)
    } else {
        let ForeignHistory { updates, decay } = serde_json::from_str(history).map_err(|e| invalid("history", e))?;
        let chain = decay.chain(&profile);
        let chain = chain.map_err(|why| Error::damaged(snapshot.path(), format!("the metadata's `history` {why}")))?;
        (chain, updates)
    };
    if updates.last() != Some(snapshot.id.step) {
        let last = updates.last().unwrap_or(0);
        let why = format!("the history ends at step {last}, not at the snapshot's step {}", snapshot.id.step);
        return Err(Error::damaged(snapshot.path(), why));
    }
    Ok((profile, chain, Some(updates)))
}
