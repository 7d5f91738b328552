//! Files and folders of averages: names, shards, and a model's other files, so that its own library loads them.

mod create;
mod file_plan;
mod fit;
mod form;
mod named;
mod part_folder;
mod part_pass;
mod part_record;
mod place;
mod rename;
mod shard_names;

pub(crate) use create::{OutputTarget, check_path, is_named_as_file};
pub(crate) use file_plan::{Averaged, FilePlan};
pub use form::{FormOptions, OutputForm};
pub(crate) use part_folder::PartTarget;
pub use part_pass::PartOutcome;
pub(crate) use part_pass::PendingPart;
pub(crate) use part_record::PartSource;
pub(crate) use place::{check_inputs, resolve};
