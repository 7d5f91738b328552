//! Synthesis into files.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use super::backend::{Backend, choose};
use super::blend::overflow_error;
use super::files::{OutputFile, OutputFiles, Shards, TensorLocation};
use super::options::{MAX_TARGETS, Output, WriteOptions};
use super::part::OutputPart;
use super::source_set::{Elements, ModelTensor, Selection, SourceSet};
use super::streaming::Streaming;
use crate::compute::cpu;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::fs::{Stream, check_output, parent_dir, remove_leftovers};
use crate::planning::{Plan, groups_json, profile_json};
use crate::snapshot::{GROUPS, Meta, PROFILE, STEP};

/// Bytes of a copied tensor that are read at a time.
const COPIED_BYTES: usize = 1 << 20;

impl SourceSet<'_> {
    /// Blends plans into files, up to [`MAX_TARGETS`] in one pass over the sources. Returns the device that blended.
    ///
    /// # Errors
    /// - [`Error::NoTarget`] if `outputs` is empty.
    /// - [`Error::Unexpected`] if two outputs have the same path, or if one cannot be written.
    /// - [`Error::Setting`] for a dtype or a device that cannot be used.
    /// - Those of [`SourceSet::select`] and [`SourceSet::write_files`].
    pub(crate) fn write(&self, outputs: &[Output<'_>], options: &WriteOptions<'_>) -> Result<Device> {
        check_distinct(outputs.iter().map(|output| output.path))?;
        outputs.iter().try_for_each(|output| check_output(output.path))?;
        options.check()?;
        if outputs.is_empty() {
            return Err(Error::NoTarget);
        }
        let shards = Shards::single(self, options.dtype)?;
        // The device is opened before any file is created.
        let mut device = Backend::open(options.device)?.device();
        for outputs in outputs.chunks(MAX_TARGETS) {
            let plans: Vec<&Plan> = outputs.iter().map(|output| output.plan).collect();
            let files: Vec<Vec<OutputFile>> = outputs.iter().map(|output| vec![self.output_file(output)]).collect();
            device = self.write_files(&self.select(&plans)?, &shards, &files, options)?;
        }
        Ok(device)
    }

    /// Blends the targets of a selection in one pass, each into its list of files. Returns the device that blended.
    ///
    /// # Errors
    /// - [`Error::Tensor`] if a tensor is missing, or if a sum does not fit its dtype.
    /// - [`Error::Io`] if a file cannot be written, [`Error::Unexpected`] if it would replace a pipe or a device.
    /// - [`Error::Cuda`] if the device fails.
    pub(crate) fn write_files(
        &self,
        selection: &Selection<'_>,
        shards: &Shards,
        outputs: &[Vec<OutputFile>],
        options: &WriteOptions<'_>,
    ) -> Result<Device> {
        let files = outputs.iter().flatten().filter(|file| !Stream::is_named(&file.path));
        let directories: BTreeSet<&Path> = files.map(|file| parent_dir(&file.path)).collect();
        directories.into_iter().for_each(remove_leftovers);
        let files = outputs.iter().map(|target| shards.create(target)).collect::<Result<Vec<_>>>()?;
        self.fill(selection, shards, files, shards.all(), options)
    }

    /// Blends a part's share of the targets of a selection into existing files, and makes it durable. Returns the
    /// device that blended.
    ///
    /// # Errors
    /// As [`SourceSet::write_files`].
    pub(crate) fn write_part(
        &self,
        selection: &Selection<'_>,
        shards: &Shards,
        outputs: &[Vec<OutputFile>],
        part: OutputPart,
        options: &WriteOptions<'_>,
    ) -> Result<Device> {
        let files = outputs.iter().map(|target| shards.open(target, part)).collect::<Result<Vec<_>>>()?;
        self.fill(selection, shards, files, shards.share(part), options)
    }

    /// Writes a range of the data sections of all targets, and commits the files.
    fn fill(
        &self,
        selection: &Selection<'_>,
        shards: &Shards,
        files: Vec<OutputFiles>,
        share: Range<usize>,
        options: &WriteOptions<'_>,
    ) -> Result<Device> {
        self.copy(selection, shards, &files, &share)?;
        let streaming = Streaming::new(self, selection, shards, &files, &share, options)?;
        let device = self.blend(&streaming, options.device)?;
        drop(streaming);
        // The CPU blends what it has computed.
        selection.for_each_group(|group| Streaming::of_group(self, group, shards, &files, &share, options)?.run())?;
        files.into_iter().try_for_each(OutputFiles::commit)?;
        Ok(device)
    }

    /// Blends the tensors of a pass. Returns the device that blended.
    fn blend(&self, streaming: &Streaming<'_>, wanted: Device) -> Result<Device> {
        if streaming.elements() == 0 {
            return Ok(Device::Cpu);
        }
        let backend = choose(streaming, self.device(wanted))?;
        match &backend {
            Backend::Cpu => streaming.run().map(|()| Device::Cpu),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => match streaming.run_on(device) {
                // Only the CPU keeps infinities that all sources share.
                Err(error @ Error::Tensor { .. }) => streaming.run_again().map(|()| Device::Cpu).map_err(|_| error),
                done => done.map(|()| backend.device()),
            },
        }
    }

    /// Copies the tensors that are not averaged, as far as they are in the share.
    fn copy(
        &self,
        selection: &Selection<'_>,
        shards: &Shards,
        files: &[OutputFiles],
        share: &Range<usize>,
    ) -> Result<()> {
        for location in shards.locations() {
            let tensor = &self.tensors[location.tensor];
            if tensor.averaged {
                continue;
            }
            for (target, files) in files.iter().enumerate() {
                let elements = selection.copied(target, tensor)?;
                copy(files, &location, tensor, elements, share)?;
            }
        }
        Ok(())
    }

    fn output_file(&self, output: &Output<'_>) -> OutputFile {
        OutputFile { path: output.path.to_owned(), metadata: metadata(output.plan, &self.tied) }
    }
}

/// Returns the metadata of an average, with the name of the kept tensor for each tied one.
pub(crate) fn metadata(plan: &Plan, tied: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut strings = Meta { tied: tied.clone(), ..Meta::default() }.to_strings();
    strings.insert(PROFILE.into(), profile_json(&plan.profile));
    strings.insert(STEP.into(), plan.at.to_string());
    if !plan.groups.is_empty() {
        strings.insert(GROUPS.into(), groups_json(&plan.groups));
    }
    strings
}

/// Writes the share of a copied tensor in pieces, converted if the file has another floating-point dtype.
fn copy(
    files: &OutputFiles,
    location: &TensorLocation,
    tensor: &ModelTensor,
    elements: Elements<'_>,
    share: &Range<usize>,
) -> Result<()> {
    let is_converted = location.dtype != tensor.dtype;
    // Bytes are copied as they are; elements may be smaller.
    let [from, to] =
        if is_converted { [tensor.dtype, location.dtype].map(|dtype| dtype.bitsize() / 8) } else { [1, 1] };
    let blend = cpu::Blend { dtypes: &[tensor.dtype], weights: &[1.0], output: location.dtype };
    let (mut piece, mut converted) = (Vec::new(), Vec::new());
    let own = location.elements_in(share, to);
    let each = COPIED_BYTES / from;
    for start in own.clone().step_by(each) {
        let range = start * from..own.end.min(start + each) * from;
        let piece = elements.read(range, &mut piece).unwrap_or_default();
        let place = location.range.start + start * to;
        if !is_converted {
            files.write_block_at(location.file, place, piece)?;
            continue;
        }
        converted.resize(piece.len() / from * to, 0);
        let fits = cpu::blend(&mut [&mut converted], &[piece], &blend);
        fits.map_err(|overflow| overflow_error(&tensor.name, location.dtype, overflow, start))?;
        files.write_at(location.file, place, &converted)?;
    }
    Ok(())
}

/// Checks that each target has a file or folder of its own.
///
/// # Errors
/// [`Error::Unexpected`] if two paths are equal.
pub(crate) fn check_distinct<'p>(paths: impl Iterator<Item = &'p Path>) -> Result<()> {
    let mut paths: Vec<&Path> = paths.collect();
    paths.sort_unstable();
    match paths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::unexpected(
            pair[0],
            "two targets are to be written to this one file: give each a name of its own",
        )),
        None => Ok(()),
    }
}
