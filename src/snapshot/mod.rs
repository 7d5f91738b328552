//! The files of a run: self-describing safetensors, written atomically, read mapped, found by listing the directory.
//!
//! Nothing here interprets profiles or histories; they pass through as JSON text.

mod checksum;
mod directory;
mod header;
mod layout;
mod meta;
mod open_run;
mod read;
mod shards;
mod tensors;
mod write;

pub use directory::{Snapshot, SnapshotId, list, list_each};
pub(crate) use directory::{any_part, check_empty, remove, remove_leftovers};
pub use layout::FileLayout;
pub(crate) use layout::MAX_HEADER;
pub use meta::{Dtypes, Meta};
pub(crate) use meta::{PROFILE, STEP, base_strings, check_version, new_run_id};
pub(crate) use open_run::{is_gone, open_all, open_sound};
pub use read::StoredFile;
pub use tensors::{StoredTensor, StoredTensors};
pub(crate) use write::{write_file, write_snapshot};

/// The live state of a run, for resuming.
pub const STATE_FILE: &str = "state.safetensors";

/// The shard size beyond which a snapshot is split, as Hugging Face's tools have it: 5 GB.
pub const SHARD_SIZE: u64 = 5_000_000_000;
