//! Averages of a run in a form: like a model's folder, in shards, or under other names.

use std::rc::Rc;

use super::Run;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::output::{
    Averaged, FilePlan, OutputForm, OutputTarget, PartOutcome, PartSource, PartTarget, PendingPart, check_inputs,
    check_path,
};
use crate::planning::{Plan, Weight, log_warnings};
use crate::snapshot::Snapshot;
use crate::synthesis::{
    Output, OutputFile, OutputPart, SourceSet, WriteOptions, check_device, check_distinct, metadata,
};

impl Run {
    /// Writes planned averages as [`Run::write_all`] does, in a form: like the folder of a model, in shards, or under
    /// other names.
    ///
    /// Folders appear whole or not at all.
    ///
    /// # Errors
    /// As [`Run::write_all`] and [`Run::check_form`]; [`Error::Unexpected`] for a folder that is not empty, or within
    /// the form's own.
    pub fn write_as(&self, outputs: &[Output<'_>], form: &OutputForm, options: &WriteOptions<'_>) -> Result<Device> {
        if form.is_plain() {
            return self.write_all(outputs, options);
        }
        if outputs.is_empty() {
            return Err(Error::NoTarget);
        }
        check_distinct(outputs.iter().map(|output| output.path))?;
        for Output { path, .. } in outputs {
            self.check_outside(path)?;
            check_inputs(path, form.folder())?;
            check_path(path, form.is_folder())?;
        }
        options.check()?;
        let plans = || outputs.iter().map(|output| output.plan);
        log_warnings(&self.dir, plans());
        let set = self.source_set_of(plans())?;
        let files = file_plan(&set, form, options)?;
        let mut device = check_device(options.device)?;
        for outputs in outputs.chunks(files.targets_in_one_pass()) {
            let target = |output: &Output<'_>| metadata(output.plan, &files.tied);
            let targets: Vec<OutputTarget<'_>> =
                outputs.iter().map(|output| OutputTarget { path: output.path, metadata: target(output) }).collect();
            let plans: Vec<&Plan> = outputs.iter().map(|output| output.plan).collect();
            let selection = set.select(&plans)?;
            let open = files.create(&targets)?;
            device = set.write_files(&selection, &files.shards, &open.files, options)?;
            files.finish(open)?;
        }
        Ok(device)
    }

    /// Writes one part of planned averages. When all parts are written, by any processes that share a file system, the
    /// averages appear, with the bytes of [`Run::write_as`].
    ///
    /// Parts do not wait for each other. They may run at the same time or one after the other, on any machines, and may
    /// be run again. Each writes its share of all files, by bytes, into a hidden folder `.NAME.parts` beside the
    /// average; the last one to finish gives the average its name and removes the folder. A part that was written
    /// before does nothing. All parts use the weights that the first one solved for.
    ///
    /// # Errors
    /// As [`Run::write_as`], and [`Error::Unexpected`] for parts of other snapshots, targets or options, or of another
    /// number of parts.
    pub fn write_part(
        &self,
        outputs: &[Output<'_>],
        form: &OutputForm,
        options: &WriteOptions<'_>,
        part: OutputPart,
    ) -> Result<PartOutcome> {
        if outputs.is_empty() {
            return Err(Error::NoTarget);
        }
        check_distinct(outputs.iter().map(|output| output.path))?;
        for Output { path, .. } in outputs {
            self.check_outside(path)?;
            check_inputs(path, form.folder())?;
        }
        options.check()?;
        let plans = || outputs.iter().map(|output| output.plan);
        log_warnings(&self.dir, plans());
        let set = self.source_set_of(plans())?;
        let files = file_plan(&set, form, options)?;
        check_device(options.device)?;
        let source = |snapshot: &Snapshot| {
            let files = snapshot.files().iter().map(|file| file.path().to_owned()).collect();
            Rc::new(PartSource::new(format!("snapshot {}", snapshot.id), files))
        };
        let sources: Vec<Rc<PartSource>> = self.snapshots.iter().map(source).collect();
        let mut outcome = PartOutcome::default();
        for outputs in outputs.chunks(files.targets_in_one_pass()) {
            let targets: Vec<PartTarget<'_>> =
                outputs.iter().map(|output| self.part_target(output, &files, &sources)).collect();
            let blend = |pending: Vec<PendingPart>| {
                let plan = |part: &PendingPart| with_weights(outputs[part.target].plan, &part.weights);
                let plans: Vec<Plan> = pending.iter().map(plan).collect();
                let selection = set.select(&plans.iter().collect::<Vec<_>>())?;
                let parts: Vec<Vec<OutputFile>> = pending.into_iter().map(|part| part.files).collect();
                set.write_part(&selection, &files.shards, &parts, part, options)
            };
            outcome.join(files.write_part(&targets, part, options.dtype, &blend)?);
        }
        Ok(outcome)
    }

    /// Describes an average that is written in parts. `sources` has an entry for each snapshot.
    fn part_target<'a>(&self, output: &Output<'a>, files: &FilePlan, sources: &[Rc<PartSource>]) -> PartTarget<'a> {
        let Output { plan, path } = *output;
        let newest = self.snapshots.iter().map(|snapshot| snapshot.id.step).filter(|&step| step <= plan.at).max();
        let is_used = |snapshot: &&Snapshot| {
            let has_weight = |weight: &Weight| (weight.index, weight.step) == (snapshot.id.index, snapshot.id.step);
            Some(snapshot.id.step) == newest || plan.all_weights().any(has_weight)
        };
        let used = self.snapshots.iter().zip(sources).filter(|(snapshot, _)| is_used(snapshot));
        PartTarget {
            path,
            metadata: metadata(plan, &files.tied),
            label: format!("{} at step {}", plan.profile, plan.at),
            sources: used.map(|(_, source)| Rc::clone(source)).collect(),
            weights: plan.all_weights().map(|weight| weight.weight).collect(),
        }
    }

    /// Checks that planned averages fit a form, and returns what a user may want to know of it: names that were
    /// changed, and tied tensors that are not written.
    ///
    /// # Errors
    /// [`Error::Unexpected`] with all tensors that the form's folder has and the average lacks, with all that the
    /// folder lacks, and with all of another shape; [`Error::Setting`] for rules by which two tensors get one name, and
    /// for rules and patterns that match nothing.
    pub fn check_form(&self, plans: &[Plan], form: &OutputForm) -> Result<Vec<String>> {
        Ok(file_plan(&self.source_set_of(plans)?, form, &WriteOptions::default())?.notes)
    }
}

/// Returns a plan with other weights, in the order of [`Plan::all_weights`].
fn with_weights(plan: &Plan, weights: &[f64]) -> Plan {
    let mut plan = plan.clone();
    let own = plan.weights.iter_mut().chain(plan.later.iter_mut().flat_map(|later| &mut later.weights));
    own.zip(weights).for_each(|(own, &weight)| own.weight = weight);
    plan
}

fn file_plan(set: &SourceSet<'_>, form: &OutputForm, options: &WriteOptions<'_>) -> Result<FilePlan> {
    let is_tied = &|_: &str, _: &str| false;
    let averaged = Averaged { set, example: None, is_folder: false, follow_links: false, is_tied, left_out: &[] };
    FilePlan::new(&averaged, form, options.dtype)
}
