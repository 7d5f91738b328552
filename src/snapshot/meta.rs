//! Metadata of a snapshot, in the header of each of its files.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use serde::de::DeserializeOwned;

use super::extension::Extension;
use super::session::Session;
use crate::error::{Error, Result};

/// Key of the profile.
pub const PROFILE: &str = "profile";
/// Key of the targets of groups of tensors, in an average that has such.
pub const GROUPS: &str = "groups";
/// Key of the step.
pub const STEP: &str = "step";
const FORMAT: &str = "format";
const VERSION: &str = "posthoc_ema";
const HISTORY: &str = "history";
const DTYPES: &str = "dtypes";
const COPIED: &str = "copied";
const TIED: &str = "tied";
const RUN: &str = "run";
const SESSION: &str = "session";
const EXTENSIONS: &str = "extensions";

/// Keys of metadata that concern the tensors of a file alone.
pub(super) const OF_TENSORS: &[&str] = &[DTYPES, COPIED, TIED];

/// Keys of metadata that are equal in all files of a snapshot.
pub(super) const OF_SNAPSHOT: &[&str] = &[PROFILE, STEP, HISTORY, RUN, SESSION, EXTENSIONS];

/// Version of files whose tensors all began with the run.
const FIRST_VERSION: &str = "1";

/// Version of files of an extended run. A reader of the first version would give wrong weights to what began later.
const EXTENDED_VERSION: &str = "2";

/// Version of live states whose low-order terms are integers, extended or not. Older readers would take them for bf16.
const TERMS_VERSION: &str = "3";

/// Version of files that hold parts of tensors. Older readers would take a part for the whole.
const PARTS_VERSION: &str = "4";

/// Metadata of a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    /// Profile, as JSON.
    pub profile: String,
    /// Step of the last update in the average.
    pub step: u64,
    /// Updates in the average, as JSON, if they are known.
    pub history: Option<String>,
    /// Model dtype of each tensor that is stored in another dtype.
    pub dtypes: Dtypes,
    /// Floating-point tensors that are copied from the newest update instead of averaged.
    pub copied: BTreeSet<String>,
    /// Random identifier of the run that wrote the snapshot.
    pub run: Option<String>,
    /// Session of the run that wrote the snapshot. Older versions stored none.
    pub session: Option<Session>,
    /// Names of tied tensors, as `dropped name -> kept name`.
    pub tied: BTreeMap<String, String>,
    /// Extensions of the run before this snapshot, the oldest first.
    pub extensions: Vec<Extension>,
}

/// Dtypes of tensors, by name. The snapshots of a run have thousands of equal entries and share one map.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dtypes(Arc<BTreeMap<String, Dtype>>);

impl Deref for Dtypes {
    type Target = BTreeMap<String, Dtype>;

    fn deref(&self) -> &BTreeMap<String, Dtype> {
        &self.0
    }
}

/// Copies the map first if it is shared.
impl DerefMut for Dtypes {
    fn deref_mut(&mut self) -> &mut BTreeMap<String, Dtype> {
        Arc::make_mut(&mut self.0)
    }
}

impl FromIterator<(String, Dtype)> for Dtypes {
    fn from_iter<I: IntoIterator<Item = (String, Dtype)>>(dtypes: I) -> Dtypes {
        Dtypes(Arc::new(dtypes.into_iter().collect()))
    }
}

impl Meta {
    /// Returns the strings of `__metadata__`, without the checksums.
    pub fn to_strings(&self) -> BTreeMap<String, String> {
        // Hugging Face's tools expect each pair `dropped name -> kept name` as an entry, as `save_model` writes it.
        // This crate reads the key `tied` instead, which cannot be confused with the name of a tensor.
        let mut strings = self.tied.clone();
        strings.extend(versioned_strings(&self.extensions));
        strings.insert(PROFILE.into(), self.profile.clone());
        strings.insert(STEP.into(), self.step.to_string());
        strings.insert(DTYPES.into(), serde_json::json!(*self.dtypes).to_string());
        strings.insert(TIED.into(), serde_json::json!(self.tied).to_string());
        strings.insert(COPIED.into(), serde_json::json!(self.copied).to_string());
        strings.extend(self.history.clone().map(|history| (HISTORY.into(), history)));
        strings.extend(self.run.clone().map(|run| (RUN.into(), run)));
        strings.extend(self.session.as_ref().map(|session| (SESSION.into(), serde_json::json!(session).to_string())));
        if !self.extensions.is_empty() {
            strings.insert(EXTENSIONS.into(), serde_json::json!(self.extensions).to_string());
        }
        strings
    }

    /// Reads the strings of `__metadata__` of the file at `path`.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if the file is not a snapshot or is of a newer version, [`Error::Damaged`] if a value does
    /// not parse.
    pub fn from_strings(path: &Path, strings: &BTreeMap<String, String>) -> Result<Meta> {
        Meta::from_strings_like(path, strings, None)
    }

    /// As [`Meta::from_strings`], and shares the dtypes of a sibling (its strings and metadata) if they are equal.
    pub(super) fn from_strings_like(
        path: &Path,
        strings: &BTreeMap<String, String>,
        sibling: Option<(&BTreeMap<String, String>, &Meta)>,
    ) -> Result<Meta> {
        let is_extended = check_version(path, strings)? != FIRST_VERSION;
        let step = required(path, strings, STEP)?;
        let dtypes = match sibling {
            Some((its, meta)) if its.get(DTYPES) == strings.get(DTYPES) => meta.dtypes.clone(),
            _ => Dtypes(Arc::new(parse(path, strings, DTYPES, "{}")?)),
        };
        let tied = parse(path, strings, TIED, "{}")?;
        Ok(Meta {
            profile: required(path, strings, PROFILE)?.clone(),
            step: step.parse().map_err(|_| malformed(path, STEP, step))?,
            history: strings.get(HISTORY).cloned(),
            dtypes,
            copied: parse(path, strings, COPIED, "[]")?,
            run: strings.get(RUN).cloned(),
            session: session(path, strings, &tied)?,
            tied,
            extensions: if is_extended { parse(path, strings, EXTENSIONS, "[]")? } else { Vec::new() },
        })
    }
}

/// Reads the session. In files of older versions, the key may be the name of a tied tensor.
fn session(
    path: &Path,
    strings: &BTreeMap<String, String>,
    tied: &BTreeMap<String, String>,
) -> Result<Option<Session>> {
    if tied.contains_key(SESSION) { Ok(None) } else { parse(path, strings, SESSION, "null") }
}

/// Returns the value of a key that every snapshot has.
fn required<'a>(path: &Path, strings: &'a BTreeMap<String, String>, key: &str) -> Result<&'a String> {
    strings.get(key).ok_or_else(|| Error::damaged(path, format!("the metadata lack `{key}`")))
}

/// Parses the JSON value of a key, or `default` if the key is missing.
fn parse<T: DeserializeOwned>(path: &Path, strings: &BTreeMap<String, String>, key: &str, default: &str) -> Result<T> {
    let text = strings.get(key).map_or(default, String::as_str);
    serde_json::from_str(text).map_err(|_| malformed(path, key, text))
}

fn malformed(path: &Path, key: &str, value: &str) -> Error {
    Error::damaged(path, format!("the metadata's `{key}` is `{value}`"))
}

/// Returns the strings that every file of a run carries. Hugging Face's tools require `format`.
pub(crate) fn base_strings() -> BTreeMap<String, String> {
    versioned_strings(&[])
}

/// Returns the strings that every file of a run with these extensions carries.
pub(crate) fn versioned_strings(extensions: &[Extension]) -> BTreeMap<String, String> {
    let version = if extensions.is_empty() { FIRST_VERSION } else { EXTENDED_VERSION };
    strings_of(version)
}

/// Returns the strings that every file with parts of tensors carries.
pub(super) fn parts_strings() -> BTreeMap<String, String> {
    strings_of(PARTS_VERSION)
}

/// Returns the strings that every live state with low-order terms carries.
pub(crate) fn terms_strings() -> BTreeMap<String, String> {
    strings_of(TERMS_VERSION)
}

fn strings_of(version: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(FORMAT.into(), "pt".into()), (VERSION.into(), version.into())])
}

/// Checks that a file belongs to a run and that this version can read it. Returns its version.
pub(crate) fn check_version<'a>(path: &Path, strings: &'a BTreeMap<String, String>) -> Result<&'a str> {
    match strings.get(VERSION).map(String::as_str) {
        Some(version @ (FIRST_VERSION | EXTENDED_VERSION | TERMS_VERSION | PARTS_VERSION)) => Ok(version),
        Some(version) => {
            let why =
                format!("the file is of version {version}, and this program reads versions 1 to 4: use a newer one");
            Err(Error::unexpected(path, why))
        }
        None => Err(Error::unexpected(
            path,
            "not a snapshot of a run (its metadata lack `posthoc_ema`): move the file out of the directory",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Meta {
        Meta {
            profile: r#"{"kind":"power","gamma":1.5}"#.into(),
            step: u64::MAX,
            history: Some("[[10,20,10]]".into()),
            dtypes: [("w".into(), Dtype::BF16)].into_iter().collect(),
            copied: BTreeSet::from(["b".into()]),
            run: Some("abc".into()),
            session: Some(Session { number: 2, id: "d".into(), from: 10 }),
            tied: BTreeMap::from([("head".into(), "embedding".into())]),
            extensions: Vec::new(),
        }
    }

    #[test]
    fn metadata_round_trip() {
        let strings = meta().to_strings();
        assert_eq!(strings["format"], "pt");
        assert_eq!(strings["head"], "embedding");
        let mut foreign = strings.clone();
        foreign.insert("license".into(), "mit".into());
        assert_eq!(Meta::from_strings(Path::new("f"), &foreign).unwrap(), meta());
        assert_eq!(Meta::from_strings(Path::new("f"), &strings).unwrap(), meta());
        let older = Meta { session: None, ..meta() };
        assert_eq!(Meta::from_strings(Path::new("f"), &older.to_strings()).unwrap(), older);
        let begun = BTreeSet::from(["head.bias".into()]);
        let extended = Meta { extensions: vec![Extension { at: 7, begun, ..Extension::default() }], ..meta() };
        assert_eq!(extended.to_strings()["posthoc_ema"], "2");
        assert_eq!(Meta::from_strings(Path::new("f"), &extended.to_strings()).unwrap(), extended);
        let tied = BTreeMap::from([("session".into(), "embedding".into())]);
        let older = Meta { tied, ..older };
        assert_eq!(Meta::from_strings(Path::new("f"), &older.to_strings()).unwrap(), older);
    }

    #[test]
    fn siblings_share_equal_dtypes() {
        let strings = meta().to_strings();
        let meta = Meta::from_strings(Path::new("f"), &strings).unwrap();
        let like = |other: &Meta| {
            Meta::from_strings_like(Path::new("f"), &other.to_strings(), Some((&strings, &meta))).unwrap()
        };
        let mut other = Meta { step: 7, ..meta.clone() };
        let shared = like(&other);
        assert!(Arc::ptr_eq(&shared.dtypes.0, &meta.dtypes.0) && shared == other);
        other.dtypes.insert("v".into(), Dtype::F16);
        assert_eq!(like(&other), other);
        assert_eq!(meta.dtypes.len(), 1);
    }

    #[test]
    fn missing_and_malformed_keys_are_named() {
        for (key, value, expected) in [
            ("posthoc_ema", None, "not a snapshot of a run"),
            ("posthoc_ema", Some("5"), "use a newer one"),
            ("profile", None, "lack `profile`"),
            ("step", Some("-3"), "`step` is `-3`"),
            ("dtypes", Some("[]"), "`dtypes` is `[]`"),
            ("session", Some("2"), "`session` is `2`"),
        ] {
            let mut strings = meta().to_strings();
            strings.remove(key);
            strings.extend(value.map(|value| (key.to_owned(), value.to_owned())));
            let text = Meta::from_strings(Path::new("the.file"), &strings).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("the.file"), "{text}");
        }
    }
}
