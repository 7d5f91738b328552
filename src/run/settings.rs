//! Settings of a run.

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::compute::cpu::Precision;
use crate::error::{Error, Result};
use crate::math::{Profile, Retention, Schedule};
use crate::snapshot::SHARD_SIZE;
use crate::tensor::is_averaged;

/// Fully resolved settings of a run, stored with its live state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub profiles: Vec<Profile>,
    pub schedule: Schedule,
    pub max_checkpoints: usize,
    #[serde(default)]
    pub retention: Retention,
    pub checkpoint_dtype: Option<Dtype>,
    pub precision: Precision,
    pub shard_size: u64,
    /// Names of the tensors that are averaged, if not all of floating point.
    pub average: Option<Vec<String>>,
    pub copy: Vec<String>,
    pub leave_out: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            profiles: Vec::new(),
            schedule: Schedule::default(),
            max_checkpoints: 20,
            retention: Retention::default(),
            checkpoint_dtype: None,
            precision: Precision::default(),
            shard_size: SHARD_SIZE,
            average: None,
            copy: Vec::new(),
            leave_out: Vec::new(),
        }
    }
}

impl Settings {
    pub(crate) fn check(&self) -> Result<()> {
        let fail = |option, reason: String| Err(Error::Setting { option, reason });
        self.schedule.check()?;
        self.retention.check()?;
        for (i, profile) in self.profiles.iter().enumerate() {
            if !profile.is_trackable() {
                return Err(Error::NotTrackable { profile: profile.to_string() });
            }
            if self.profiles[..i].contains(profile) {
                return fail("profiles", format!("{profile} is given twice: one average of each profile is enough"));
            }
        }
        if self.max_checkpoints == 0 {
            return fail("max_checkpoints", "0 keeps no snapshot: keep at least 1".into());
        }
        if self.shard_size == 0 {
            return fail("shard_size", "a shard holds at least 1 byte".into());
        }
        match self.checkpoint_dtype {
            Some(dtype) if !is_averaged(dtype) => {
                fail("checkpoint_dtype", format!("{dtype} is not a dtype for averages: choose f32, bf16, f16 or f64"))
            }
            _ => Ok(()),
        }
    }

    /// Checks that a resume with the settings `now` changes only settings that may change.
    pub(crate) fn check_unchanged(&self, now: &Settings) -> Result<()> {
        let names = |profiles: &[Profile]| profiles.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let remedy = "leave it unchanged, or start a new run";
        check_equal("profiles", names(&self.profiles), names(&now.profiles), remedy)?;
        check_equal("precision", format!("{:?}", self.precision), format!("{:?}", now.precision), remedy)
    }

    /// Checks that a resume does not change the choice of tensors.
    pub(crate) fn check_same_choice(&self, now: &Settings) -> Result<()> {
        let remedy = "leave it unchanged, resume with `extend`, or start a new run";
        check_equal("average", format!("{:?}", self.average), format!("{:?}", now.average), remedy)?;
        check_equal("copy", format!("{:?}", self.copy), format!("{:?}", now.copy), remedy)?;
        check_equal("leave_out", format!("{:?}", self.leave_out), format!("{:?}", now.leave_out), remedy)
    }
}

fn check_equal(option: &'static str, saved: String, now: String, remedy: &str) -> Result<()> {
    if saved == now {
        return Ok(());
    }
    let reason = format!("the run has {saved}, but {now} was asked for: {remedy}");
    Err(Error::Setting { option, reason })
}
