//! Memory that the directory of an archive takes, found without holding it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

/// Bytes of an entry in both archives that are open at a time.
const ENTRY: u64 = 640;

/// Bytes for each byte of a name or a comment, and for each byte of other fields.
const TEXT: u64 = 6;
const FIELDS: u64 = 64;

/// Lengths of the records at an archive's end, and of an entry before its name.
const END: usize = 22;
const LOCATOR_64: usize = 20;
const END_64: usize = 56;
const HEADER: u64 = 46;

/// Bytes in which readers look for the last record, with the records before it.
const TAIL: u64 = (1 << 16) + 128;

/// Number of 32 bits that stands for one in the record of 64.
const WIDE: u64 = 0xffff_ffff;

/// Place of a directory in its file.
struct Directory {
    start: u64,
    entries: u64,
}

/// Returns the bytes that a reader holds for the entries of an archive.
///
/// # Errors
/// Those of the file, [`io::ErrorKind::InvalidData`] if its directory is not where `torch.save` writes it, and
/// [`io::ErrorKind::Unsupported`] if the reader would not find it there.
pub(super) fn held(file: &mut File) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    let directory = find(file, length)?;
    file.seek(SeekFrom::Start(directory.start))?;
    let mut reader = BufReader::new(&mut *file);
    let mut held = 0u64;
    for _ in 0..directory.entries {
        let mut header = [0; HEADER as usize];
        reader.read_exact(&mut header).map_err(|_| invalid())?;
        if !header.starts_with(b"PK\x01\x02") {
            return Err(invalid());
        }
        let [name, fields, comment] = [28, 30, 32].map(|at| number(&header[at..at + 2]));
        held += ENTRY + TEXT * (name + comment) + FIELDS * fields;
        reader.seek_relative((name + fields + comment) as i64)?;
    }
    file.rewind()?;
    Ok(held)
}

/// Finds the directory from the records at the end of the file, which have no comment.
fn find(file: &mut File, length: u64) -> io::Result<Directory> {
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    file.take(TAIL).read_to_end(&mut tail)?;
    let end = tail.len().checked_sub(END).ok_or_else(invalid)?;
    // A reader that refuses this record could go on with an earlier one.
    let is_ambiguous = (0..end).any(|place| is_record(&tail, place));
    if is_ambiguous || !is_record(&tail, end) {
        return Err(invalid());
    }
    let from_tail = length - tail.len() as u64;
    let record = &tail[end..];
    let [entries, size, start] = [&record[10..12], &record[12..16], &record[16..20]].map(number);
    let locator = end.checked_sub(LOCATOR_64).filter(|&at| tail[at..].starts_with(b"PK\x06\x07"));
    let Some(locator) = locator else {
        return within(Directory { start, entries }, size, from_tail + end as u64);
    };
    // PyTorch always writes records of 64 bits, and other writers if a number needs them.
    let end_64 = locator.checked_sub(END_64).ok_or_else(invalid)?;
    let record_64 = &tail[end_64..locator];
    let place = from_tail + end_64 as u64;
    let is_sound = record_64.starts_with(b"PK\x06\x06")
        && number(&record_64[4..12]) == END_64 as u64 - 12
        && number(&record_64[16..24]) == 0
        && record_64[24..32] == record_64[32..40]
        && number(&tail[locator + 4..locator + 8]) == 0
        && number(&tail[locator + 8..locator + 16]) == place
        && number(&tail[locator + 16..end]) <= 1;
    let wide = [32, 40, 48].map(|at| number(&record_64[at..at + 8]));
    let agrees = |narrow: u64, wide: u64, most: u64| narrow == most || narrow == wide;
    let agree = agrees(entries, wide[0], 0xffff) && agrees(size, wide[1], WIDE) && agrees(start, wide[2], WIDE);
    // A reader of the narrow record expects the directory right before it.
    let expected = (from_tail + end as u64).checked_sub(wide[1]).ok_or_else(invalid)?;
    file.seek(SeekFrom::Start(expected))?;
    let mut header = Vec::new();
    file.take(4).read_to_end(&mut header)?;
    if !is_sound || !agree {
        return Err(invalid());
    }
    if header == *b"PK\x01\x02" {
        return Err(hidden());
    }
    let [entries, size, start] = wide;
    within(Directory { start, entries }, size, place)
}

/// Returns true if a reader could take these bytes for the record at an archive's end.
fn is_record(tail: &[u8], place: usize) -> bool {
    let record = &tail[place..];
    if record.len() < END || !record.starts_with(b"PK\x05\x06") {
        return false;
    }
    let is_plain = record[4..8] == [0; 4] && record[8..10] == record[10..12];
    is_plain || place >= LOCATOR_64 && tail[place - LOCATOR_64..].starts_with(b"PK\x06\x07")
}

/// Checks that a directory of `size` bytes ends at `end` and has room for its entries.
fn within(directory: Directory, size: u64, end: u64) -> io::Result<Directory> {
    let fits = directory.start.checked_add(size) == Some(end) && directory.entries <= size / HEADER;
    if fits { Ok(directory) } else { Err(invalid()) }
}

/// Reads a little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Error for an archive whose first entry is as long as the two records between directory and end.
///
/// The reader would take the second entry for the first. `torch.save` writes such an archive if the file's name has 21
/// characters before its ending.
fn hidden() -> io::Error {
    let why = "the name that the file was saved under has 21 characters before its ending, which hides where the \
               archive's directory begins: load it with `torch.load`, and save it under another name";
    io::Error::new(io::ErrorKind::Unsupported, why)
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its archive has no directory at its end, as `torch.save` writes it")
}
