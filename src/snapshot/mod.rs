//! Files of a run: self-describing safetensors, written atomically, read mapped, found by listing the directory.
//!
//! Profiles and histories pass through as JSON text, which this module does not interpret.

mod aside;
mod checksum;
mod extension;
mod global_tensor;
mod header;
mod id;
mod index;
mod layout;
mod leftovers;
mod listing;
mod meta;
mod open_run;
mod open_snapshot;
mod part_files;
mod part_numbers;
mod part_places;
mod part_sets;
#[cfg(test)]
mod part_tests;
mod read;
mod rewind;
mod scattered;
mod session;
mod set_meta;
mod shards;
mod state_names;
mod tensor_set;
mod tensors;
#[cfg(test)]
mod tests;
mod write;

pub use aside::{SetAside, set_aside};
pub(crate) use aside::{carry_out, create_aside, recover, remove_set_aside};
pub use extension::Extension;
pub(crate) use extension::beginning_of;
pub(crate) use id::PartNumber;
pub use id::SnapshotId;
pub(crate) use index::{INDEX_SUFFIX, ShardIndex};
// Hidden: only the program's `bench` uses it.
#[doc(hidden)]
pub use layout::FileLayout;
pub(crate) use layout::MAX_HEADER;
pub(crate) use leftovers::remove_leftovers;
pub(crate) use listing::files_of;
pub(crate) use listing::{any_snapshot_file, check_empty, remove};
pub use listing::{list, list_each};
pub use meta::{Dtypes, Meta};
pub(crate) use meta::{GROUPS, PROFILE, STEP, base_strings, check_version, terms_strings, versioned_strings};
pub(crate) use open_run::{is_gone, open_all, open_sound};
pub use open_snapshot::Snapshot;
pub(crate) use part_files::{FileOf, ListedFile, is_complete, list_files};
pub(crate) use part_places::PartPlace;
pub(crate) use part_sets::{list_states, saved_sets};
pub use read::StoredFile;
pub(crate) use rewind::{Rewind, header_hash};
pub use session::Session;
pub(crate) use session::new_run_id;
pub(crate) use state_names::{saved_part_name, state_part_name};
pub(crate) use tensor_set::{Region, StoredElements, TensorSet};
pub use tensors::{StoredTensor, StoredTensors};
#[cfg(feature = "pytorch")]
pub(crate) use write::Fill;
pub(crate) use write::{write_file, write_part, write_snapshot};

/// File name of the live state of a run.
pub const STATE_FILE: &str = "state.safetensors";

/// File name of a live state that is saved into a folder of the caller's.
pub const SAVED_STATE_FILE: &str = "posthoc-ema.safetensors";

/// Default size of shards in bytes, as in Hugging Face's tools. Larger snapshots are split.
pub const SHARD_SIZE: u64 = 5_000_000_000;
