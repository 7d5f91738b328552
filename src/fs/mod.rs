//! Files of any kind, and the operating system: atomic writes, temporary names, locks, mappings, memory, processes.

mod atomic;
pub(crate) mod fail_point;
mod file_checks;
mod folder;
mod link;
mod lock;
mod mapping;
mod memory_room;
pub(crate) mod process;
mod scattered;
mod shared;
#[cfg(feature = "cuda")]
mod shared_libraries;
mod stream;
mod temporary;
mod threads;

pub use atomic::AtomicFile;
pub(crate) use atomic::{parent_dir, sync_directory};
pub(crate) use fail_point::attempt;
pub use file_checks::check_replaceable;
pub(crate) use file_checks::{check_regular, find_document, open_regular, read_document, read_start};
pub(crate) use folder::{AtomicFolder, CreatedDirs, check_vacant};
pub(crate) use link::replace_by_link;
pub(crate) use lock::{Lock, LockId};
pub use mapping::install_sigbus_handler;
#[cfg(feature = "cuda")]
pub(crate) use mapping::keep_from_children;
pub(crate) use mapping::{Mapping, release_pages, use_large_pages};
#[cfg(feature = "cuda")]
pub(crate) use memory_room::{MemoryRoom, memory_room};
pub(crate) use scattered::ScatteredFile;
pub(crate) use shared::{
    ScratchFolder, SharedFile, check_same_file_system, create_mark, discard, move_files, rename_into_place,
};
#[cfg(feature = "cuda")]
pub(crate) use shared_libraries::driver_libraries;
pub use stream::{Stream, check_output};
pub use temporary::remove_unfinished;
pub(crate) use temporary::{is_temporary, remove_leftovers};
pub use threads::start_threads;
