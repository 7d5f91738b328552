//! Files of PyTorch whose values take far more memory than their bytes: read or refused in bounded memory. Genuine
//! files of many small tensors are read.

use std::fs;
use std::path::Path;

use crate::hostile::run_within;

/// Address space in MiB that suffices for any file of this length: at most 160 MB of values, the program's own 100 MiB,
/// and what the allocator reserves for each thread.
const ENOUGH: usize = 450;

/// Averages a file with itself within that memory. Returns the exit status and standard error.
fn average(dir: &Path, bytes: &[u8], mebibytes: usize) -> (Option<i32>, String) {
    let path = dir.join("model.pt");
    fs::write(&path, bytes).unwrap();
    let [path, out] = [&path, &dir.join("out.safetensors")].map(|path| path.to_str().unwrap().to_owned());
    run_within(mebibytes, &["average", &path, &path, "--steps=1,2", "--uniform=2", "-o", &out])
}

fn unicode(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// Returns a file of PyTorch before 1.6: its pickle, the keys of its storages, and one f32 for each.
fn legacy(pickle: &[u8], keys: usize) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let system = [b"\x80\x02}(", &unicode("little_endian")[..], b"\x88u."].concat();
    let keys: Vec<Vec<u8>> = (0..keys).map(|key| unicode(&key.to_string())).collect();
    let list = [b"\x80\x02](", &keys.concat()[..], b"e."].concat();
    let storages = [&1u64.to_le_bytes()[..], &1f32.to_le_bytes()].concat().repeat(keys.len());
    [&magic[..], b"\x80\x02M\xe9\x03.", &system, pickle, &list, &storages].concat()
}

/// Returns the opcodes of a tensor as `torch.save` writes them, which memorize every text, tuple and tensor.
fn tensor(memo: &mut u32, storage: usize) -> Vec<u8> {
    let mut put = || {
        *memo += 1;
        [b"r", &memo.to_le_bytes()[..]].concat()
    };
    let parts: [(&[u8], bool); 12] = [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", true),
        (b"((", false),
        (&unicode("storage"), true),
        (b"ctorch\nFloatStorage\n", true),
        (&unicode(&storage.to_string()), true),
        (&unicode("cpu"), true),
        (b"K\x01t", true),
        (b"QK\x00K\x01\x85", true),
        (b"K\x01\x85", true),
        (b"\x89ccollections\nOrderedDict\n", true),
        (b")R", true),
        (b"t", true),
    ];
    let mut bytes = Vec::new();
    for (part, is_memorized) in parts {
        bytes.extend(part);
        if is_memorized {
            bytes.extend(put());
        }
    }
    bytes.push(b'R');
    bytes.extend(put());
    bytes
}

/// Returns a dict of that many tensors, within a dict under the key `outer` if it is given.
fn tensors(count: usize, outer: Option<&str>) -> Vec<u8> {
    let mut memo = 0;
    let mut bytes = b"\x80\x02}".to_vec();
    if let Some(outer) = outer {
        bytes.extend([&unicode(outer)[..], b"}"].concat());
    }
    bytes.push(b'(');
    for i in 0..count {
        bytes.extend([unicode(&format!("blocks.{i}.scale")), tensor(&mut memo, i)].concat());
    }
    bytes.extend(if outer.is_some() { &b"us."[..] } else { &b"u."[..] });
    legacy(&bytes, count)
}

#[test]
fn pickles_of_small_values_need_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let put = |i: usize| [b"Nr", &(i as u32).to_le_bytes()[..]].concat();
    let many = |unit: &[u8]| [b"(", &unit.repeat(20_000_000 / unit.len())[..], b"l"].concat();
    let key = |i: usize| [&unicode(&i.to_string()), &b"N"[..]].concat();
    let bodies: [(&str, Vec<u8>); 18] = [
        ("nested lists", many(&[b"]".repeat(500), b"a".repeat(499)].concat())),
        ("nested tuples", many(&[b")".to_vec(), b"\x85".repeat(499)].concat())),
        ("nested dicts", many(&[&b"}U\0".repeat(499)[..], b"}", &b"s".repeat(499)].concat())),
        ("lists", many(b"]")),
        ("lists of one", many(b"]Na")),
        ("a growing list", [b"]", &b"Na".repeat(10_000_000)[..]].concat()),
        ("dicts", many(b"}U\0Ns")),
        ("ordered dicts", many(b"ccollections\nOrderedDict\n(]tR")),
        ("marks", b"(".repeat(20_000_000)),
        ("numbers", many(b"K\x01")),
        ("large numbers", many(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x01")),
        ("texts", many(b"U\x01a")),
        ("lines", many(b"Va\n")),
        ("keys", [b"}(", &(0..1_500_000).flat_map(key).collect::<Vec<u8>>()[..], b"u"].concat()),
        ("classes", many(b"ca\nb\n")),
        ("objects", many(b"ca\nb\n)\x81")),
        ("memorized", [b"(", &(0..3_000_000).flat_map(put).collect::<Vec<u8>>()[..], b"l"].concat()),
        ("copies", [b"(", &unicode(&"a".repeat(1 << 16))[..], b"q\0", &b"h\0".repeat(10_000), b"l"].concat()),
    ];
    for (what, body) in bodies {
        let pickle = [b"\x80\x02}X\x01\0\0\0a", &body[..], b"s."].concat();
        let (status, text) = average(dir.path(), &legacy(&pickle, 0), ENOUGH);
        let is_clear = text.contains("model.pt: its values would take over 1") || text.contains("model.pt: no weights");
        assert!(status == Some(1) && is_clear && text.len() < 400, "{what}: {status:?} {text}");
    }
}

#[test]
fn long_keys_need_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    // The long key is not part of the tensors' names.
    let (status, text) = average(dir.path(), &tensors(2000, Some(&"k".repeat(100_000))), ENOUGH);
    assert!(status == Some(0), "{status:?} {text}");
    let keys = [&b"}"[..], &unicode(&"k".repeat(20_000))].concat().repeat(900);
    let pickle = [b"\x80\x02}(", &unicode("w")[..], &tensor(&mut 0, 0), &unicode("a"), &keys, b"N"].concat();
    let pickle = [&pickle[..], &b"s".repeat(900), b"u."].concat();
    let (status, text) = average(dir.path(), &legacy(&pickle, 1), ENOUGH);
    assert!(status == Some(0), "{status:?} {text}");
}

#[test]
fn archive_that_is_all_directory_is_refused_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let header = |i: u32| {
        let mut header = [0; 46];
        header[..4].copy_from_slice(b"PK\x01\x02");
        header[28] = 4;
        [&header[..], &i.to_le_bytes()].concat()
    };
    let count = 400_000u32;
    let directory: Vec<u8> = (0..count).flat_map(header).collect();
    let [entries, size] = [count as usize, directory.len()].map(|number| (number as u64).to_le_bytes());
    let [start, end] = [4u64, 4 + directory.len() as u64].map(u64::to_le_bytes);
    let end_64 = [b"PK\x06\x06\x2c\0\0\0\0\0\0\0", &[0; 12][..], &entries, &entries, &size, &start].concat();
    let locator = [b"PK\x06\x07\0\0\0\0", &end[..], b"\x01\0\0\0"].concat();
    let record = [b"PK\x05\x06\0\0\0\0", &[0xff; 12][..], b"\0\0"].concat();
    let bytes = [b"PK\x03\x04", &directory[..], &end_64, &locator, &record].concat();
    let (status, text) = average(dir.path(), &bytes, ENOUGH);
    assert!(status == Some(1) && text.contains("model.pt: "), "{status:?} {text}");
    // A number of entries that only the record claims.
    let claim = [&end_64[..24], &(1u64 << 40).to_le_bytes(), &(1u64 << 40).to_le_bytes(), &end_64[40..]].concat();
    let bytes = [b"PK\x03\x04", &directory[..], &claim, &locator, &record].concat();
    let (status, text) = average(dir.path(), &bytes, ENOUGH);
    assert!(status == Some(1) && text.contains("model.pt: its archive has no directory"), "{status:?} {text}");
}

#[test]
fn sixty_thousand_small_tensors_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for (count, outer) in [(30_000, None), (60_000, Some("state_dict"))] {
        let (status, text) = average(dir.path(), &tensors(count, outer), 600);
        assert_eq!(status, Some(0), "{count} tensors: {text}");
    }
}
