//! Writing of averages with progress, whole or in parts.

use std::time::Instant;

use posthoc_ema::{Device, OutputPart, PartOutcome, Result, WriteOptions};

use super::Failure;
use super::args::BlendArgs;
use super::part::part_bar;

/// Bytes read, seconds taken, the device that blended, and the state of the parts if there are several.
pub struct Written {
    pub bytes: u64,
    pub seconds: f64,
    pub device: Option<Device>,
    pub part: Option<PartOutcome>,
}

/// Writes averages for which `bytes` are read, whole or the part of this process, and shows a bar of the bytes.
pub fn write_outputs(
    bytes: u64,
    message: &'static str,
    blend: &BlendArgs,
    part: Option<OutputPart>,
    whole: impl FnOnce(&WriteOptions<'_>) -> Result<Device>,
    share: impl FnOnce(&WriteOptions<'_>, OutputPart) -> Result<PartOutcome>,
) -> Result<Written, Failure> {
    let bar = part_bar(bytes, message, part);
    let progress = |bytes| bar.inc(bytes);
    let options = WriteOptions { dtype: blend.dtype(), device: blend.device, progress: Some(&progress) };
    let start = Instant::now();
    let part = part.map(|part| share(&options, part)).transpose()?;
    let device = match &part {
        Some(outcome) => outcome.device,
        None => Some(whole(&options)?),
    };
    let bytes = if part.is_some() { bar.position() } else { bytes };
    bar.finish_and_clear();
    Ok(Written { bytes, seconds: start.elapsed().as_secs_f64(), device, part })
}
