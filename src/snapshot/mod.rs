//! The files of a run: self-describing safetensors, written atomically, read mapped, found by listing the directory.
//!
//! Nothing here interprets profiles or histories; they pass through as JSON text.

mod atomic;
mod checksum;
mod directory;
pub(crate) mod faults;
mod folder;
#[cfg(feature = "import")]
pub(crate) mod foreign;
mod header;
mod layout;
mod lock;
mod mapping;
mod meta;
mod read;
mod regular;
mod shards;
mod siblings;
mod temporary;
mod tensors;
mod write;

pub(crate) use atomic::{AtomicFile, directory, sync_directory};
#[cfg(feature = "import")]
pub(crate) use atomic::{check_limit, file_limit};
pub use directory::{Snapshot, Stem, list, list_each};
pub(crate) use directory::{any_part, check_empty, remove, remove_leftovers};
pub(crate) use folder::{AtomicFolder, Made, check_vacant};
pub use layout::TensorSpec;
pub(crate) use layout::{FileLayout, MAX_HEADER};
pub(crate) use lock::Lock;
pub use meta::{Dtypes, Meta};
pub(crate) use meta::{PROFILE, STEP, base_strings, check_version, new_run_id};
pub use read::StoredFile;
pub(crate) use regular::{find_document, read_document};
pub(crate) use siblings::{is_gone, open_all, open_sound};
#[doc(hidden)]
pub use temporary::remove_unfinished;
#[cfg(feature = "import")]
pub(crate) use temporary::scratch_folder;
pub(crate) use temporary::{Held, is_temporary, remove_left};
pub use tensors::{StoredTensor, StoredTensors};
pub(crate) use write::{write_file, write_snapshot};

/// The live state of a run, for resuming.
pub const STATE_FILE: &str = "state.safetensors";

/// The shard size beyond which a snapshot is split, as Hugging Face's tools have it: 5 GB.
pub const SHARD_SIZE: u64 = 5_000_000_000;
