//! Standard errors of evaluations that run side by side.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::Profile;
use posthoc_ema::sweep::Candidate;

/// Bytes that are kept of each evaluation, from its end.
const KEPT_BYTES: usize = 64 << 10;

/// Standard errors of evaluations until it is their turn.
#[derive(Default)]
pub struct KeptErrors(Mutex<BTreeMap<Place, Vec<u8>>>);

/// Profile as text, and number of the repeat.
pub type Place = (String, u32);

impl KeptErrors {
    /// Notes the beginning of an evaluation.
    pub fn begin(&self, candidate: &Candidate<'_>) -> Place {
        let place = (key(&candidate.plan.profile), candidate.repeat);
        self.lock().insert(place.clone(), Vec::new());
        place
    }

    pub fn append(&self, place: &Place, bytes: &[u8]) {
        if let Some(kept) = self.lock().get_mut(place) {
            kept.extend_from_slice(bytes);
            kept.drain(..kept.len().saturating_sub(KEPT_BYTES));
        }
    }

    /// Returns the bytes of the first repeat of a profile that were not returned before.
    pub fn take(&self, profile: &Profile) -> Vec<u8> {
        let mut all = self.lock();
        let profile = key(profile);
        let place = all.keys().find(|(other, _)| *other == profile).cloned();
        place.and_then(|place| all.remove(&place)).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Place, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Text of a profile with all digits.
fn key(profile: &Profile) -> String {
    format!("{profile:?}")
}
