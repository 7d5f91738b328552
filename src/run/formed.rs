//! Averages of a run in a form: like a model's folder, in shards, or under other names.

use super::Run;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::output::{Averaged, FilePlan, OutputForm, OutputTarget, check_inputs, check_path};
use crate::planning::{Plan, log_warnings};
use crate::synthesis::{Output, SourceSet, WriteOptions, check_device, check_distinct, metadata};

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

fn file_plan(set: &SourceSet<'_>, form: &OutputForm, options: &WriteOptions<'_>) -> Result<FilePlan> {
    let is_tied = &|_: &str, _: &str| false;
    let averaged = Averaged { set, example: None, is_folder: false, follow_links: false, is_tied, left_out: &[] };
    FilePlan::new(&averaged, form, options.dtype)
}
