//! Memory that this process may still take, by the system and by the limits of its container.
#![cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only pinned memory needs it"))]

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that is left, and the limit that leaves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryRoom {
    /// Bytes.
    pub free: u64,
    /// Limit in words, such as "the limit of 8.0 GB in /sys/fs/cgroup/memory.max".
    pub limit: String,
}

/// Names of the files of a version of control groups.
struct ControlFiles {
    limit: &'static str,
    used: &'static str,
    /// Entries of `memory.stat` with the cached files, which the system drops when memory is needed.
    cached: [&'static str; 2],
}

const VERSION_1: ControlFiles = ControlFiles {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};

const VERSION_2: ControlFiles =
    ControlFiles { limit: "memory.max", used: "memory.current", cached: ["inactive_file", "active_file"] };

/// Returns the memory that this process may still take, by its narrowest limit; none if the system names no limit.
pub(crate) fn memory_room() -> Option<MemoryRoom> {
    read_room(Path::new("/"))
}

/// Returns the room by the files below a root folder.
fn read_room(root: &Path) -> Option<MemoryRoom> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let group_rooms = groups.lines().flat_map(|line| rooms_of_group(root, line));
    group_rooms.chain(available(root)).min_by_key(|room| room.free)
}

/// Returns the memory that is available in the whole system.
fn available(root: &Path) -> Option<MemoryRoom> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kilobytes = entry(&text, "MemAvailable:")?;
    Some(MemoryRoom { free: kilobytes * 1024, limit: "the available memory of the system".into() })
}

/// Returns the rooms of a group in a line of `/proc/self/cgroup`, and of the groups around it.
fn rooms_of_group(root: &Path, line: &str) -> Vec<MemoryRoom> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
    let (folder, files) = match controllers {
        "" => ("sys/fs/cgroup", &VERSION_2),
        list if list.split(',').any(|controller| controller == "memory") => ("sys/fs/cgroup/memory", &VERSION_1),
        _ => return Vec::new(),
    };
    let group = Path::new(path.trim_start_matches('/'));
    // In a container, the path may be that of the host, and the container's own group is the top one.
    group.ancestors().filter_map(|group| room_of_folder(root, &Path::new(folder).join(group), files)).collect()
}

fn room_of_folder(root: &Path, group: &Path, files: &ControlFiles) -> Option<MemoryRoom> {
    let folder = root.join(group);
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // Without a limit the text is "max", or a number beyond all memory.
    let limit = number(files.limit).filter(|limit| *limit < 1 << 60)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached: u64 = files.cached.iter().filter_map(|name| entry(&stat, name)).sum();
    let used = number(files.used)?.saturating_sub(cached);
    let path = PathBuf::from("/").join(group).join(files.limit);
    let limit_in_words = format!("the limit of {:.1} GB in {}", limit as f64 / 1e9, path.display());
    Some(MemoryRoom { free: limit.saturating_sub(used), limit: limit_in_words })
}

/// Returns the number after a name at the start of a line.
fn entry(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 64000000 kB\nMemAvailable:   32000000 kB\nSwapFree: 1 kB\n");

    #[test]
    fn version_2_limits_of_all_groups_around_count() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/box\n"),
            ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/memory.max", "8000000000\n"),
            ("sys/fs/cgroup/pod/memory.current", "5000000000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 1000000000\nactive_file 500000000\n"),
        ]);
        let limit = "the limit of 8.0 GB in /sys/fs/cgroup/pod/memory.max".to_owned();
        assert_eq!(read_room(root.path()), Some(MemoryRoom { free: 4_500_000_000, limit }));
    }

    #[test]
    fn version_1_limit_of_a_container_counts() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "12:cpu,cpuacct:/x\n5:memory:/docker/of-the-host\n0::/system\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 500000000\n"),
        ]);
        let limit = "the limit of 2.0 GB in /sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned();
        assert_eq!(read_room(root.path()), Some(MemoryRoom { free: 1_000_000_000, limit }));
    }

    #[test]
    fn without_a_limit_the_available_memory_counts() {
        let unlimited = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        let root = system(&[MEMINFO, ("proc/self/cgroup", "5:memory:/\n"), unlimited]);
        assert_eq!(read_room(root.path()).unwrap().free, 32_768_000_000);
        assert_eq!(read_room(system(&[]).path()), None);
        assert_eq!(read_room(system(&[("proc/meminfo", "MemAvailable: many kB\n")]).path()), None);
    }
}
