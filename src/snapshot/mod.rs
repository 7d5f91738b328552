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
mod listing;
#[allow(dead_code, reason = "sharded tracking will use the rest")]
mod meta;
mod open_run;
mod open_snapshot;
#[allow(dead_code, reason = "sharded tracking will use the rest")]
mod part_places;
#[allow(dead_code, reason = "sharded tracking will use the rest")]
mod part_sets;
#[cfg(test)]
mod part_tests;
mod read;
mod rewind;
mod scattered;
mod session;
mod set_meta;
mod shards;
#[allow(dead_code, reason = "sharded tracking will use the rest")]
mod tensor_set;
mod tensors;
#[cfg(test)]
mod tests;
#[allow(dead_code, reason = "sharded tracking will use the rest")]
mod write;

pub use aside::{SetAside, set_aside};
pub(crate) use aside::{carry_out, create_aside, recover, remove_set_aside};
pub use extension::Extension;
pub(crate) use extension::beginning_of;
pub use id::SnapshotId;
pub(crate) use index::{INDEX_SUFFIX, ShardIndex};
// Hidden: only the program's `bench` uses it.
#[doc(hidden)]
pub use layout::FileLayout;
pub(crate) use layout::MAX_HEADER;
pub(crate) use listing::files_of;
pub(crate) use listing::{any_snapshot_file, check_empty, remove, remove_leftovers};
pub use listing::{list, list_each};
pub use meta::{Dtypes, Meta};
pub(crate) use meta::{GROUPS, PROFILE, STEP, base_strings, check_version, terms_strings, versioned_strings};
pub(crate) use open_run::{is_gone, open_all, open_sound};
pub use open_snapshot::Snapshot;
#[allow(unused_imports, reason = "sharded tracking will use the rest")]
pub(crate) use part_places::PartPlace;
#[allow(unused_imports, reason = "sharded tracking will use the rest")]
pub(crate) use part_sets::{StateSet, list_states, parse_state_part, saved_part_name, saved_sets, state_part_name};
pub use read::StoredFile;
pub(crate) use rewind::{Rewind, header_hash};
pub use session::Session;
pub(crate) use session::new_run_id;
#[allow(unused_imports, reason = "sharded tracking will use the rest")]
pub(crate) use tensor_set::{Region, StoredElements, TensorSet};
pub use tensors::{StoredTensor, StoredTensors};
#[cfg(feature = "pytorch")]
pub(crate) use write::Fill;
#[allow(unused_imports, reason = "sharded tracking will use the rest")]
pub(crate) use write::{write_file, write_part, write_snapshot};

/// File name of the live state of a run.
pub const STATE_FILE: &str = "state.safetensors";

/// File name of a live state that is saved into a folder of the caller's.
pub const SAVED_STATE_FILE: &str = "posthoc-ema.safetensors";

/// Default size of shards in bytes, as in Hugging Face's tools. Larger snapshots are split.
pub const SHARD_SIZE: u64 = 5_000_000_000;
