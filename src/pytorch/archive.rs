//! The entries of a ZIP archive as `torch.save` writes it: stored as they are, with a directory at the end.

use std::collections::BTreeMap;
use std::ops::Range;

/// Lengths of the records at an archive's end, and of an entry before its name in the directory and at its place.
const END: usize = 22;
const LOCATOR_64: usize = 20;
const END_64: usize = 56;
const HEADER: usize = 46;
const LOCAL_HEADER: usize = 30;

/// Number that stands for one in a record of 64 bits.
const WIDE: u64 = 0xffff_ffff;

/// Tag of the field with numbers of 64 bits.
const WIDE_FIELD: u64 = 1;

/// Entries of an archive by their names.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    /// Place of each entry in the file; `None` for one that is compressed or encrypted.
    entries: BTreeMap<&'a str, Option<Range<usize>>>,
}

impl<'a> Archive<'a> {
    /// Reads the directory of an archive. Nothing takes more memory than the directory itself.
    ///
    /// # Errors
    /// The reason, if the directory is not at the end of the file or leads out of it.
    pub(super) fn new(file: &'a [u8]) -> Result<Archive<'a>, &'static str> {
        let Directory { mut bytes, entries: expected } = find(file)?;
        let mut entries = BTreeMap::new();
        for _ in 0..expected {
            let header = bytes.get(..HEADER).filter(|header| header.starts_with(b"PK\x01\x02")).ok_or(NO_DIRECTORY)?;
            let [name, fields, comment] = [28, 30, 32].map(|at| number(&header[at..at + 2]) as usize);
            let parts = bytes.get(HEADER..HEADER + name + fields).ok_or(NO_DIRECTORY)?;
            let (name, fields) = parts.split_at(name);
            let name = std::str::from_utf8(name).map_err(|_| "an entry's name is not UTF-8")?;
            let is_stored = number(&header[10..12]) == 0 && header[8] & 1 == 0;
            let range = place(file, header, fields);
            if is_stored && range.is_none() {
                return Err("an entry leads out of it");
            }
            if entries.insert(name, range.filter(|_| is_stored)).is_some() {
                return Err("two of its entries have one name");
            }
            bytes = bytes.get(HEADER + parts.len() + comment..).ok_or(NO_DIRECTORY)?;
        }
        Ok(Archive { entries })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Returns the place of an entry in the file; `None` if it is missing or compressed.
    pub(super) fn get(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(name).cloned().flatten()
    }
}

const NO_DIRECTORY: &str = "its archive has no directory at its end, as `torch.save` writes it";

struct Directory<'a> {
    bytes: &'a [u8],
    entries: u64,
}

/// Finds the directory by the records at the end of the file, which have no comment.
fn find(file: &[u8]) -> Result<Directory<'_>, &'static str> {
    let end = file.len().checked_sub(END).filter(|&end| file[end..].starts_with(b"PK\x05\x06")).ok_or(NO_DIRECTORY)?;
    let record = &file[end..];
    let mut numbers = [&record[10..12], &record[12..16], &record[16..20]].map(number);
    let mut until = end;
    let locator = end.checked_sub(LOCATOR_64).filter(|&at| file[at..].starts_with(b"PK\x06\x07"));
    if let Some(locator) = locator {
        // PyTorch always writes records of 64 bits, and other writers if a number needs them.
        let place = locator.checked_sub(END_64).ok_or(NO_DIRECTORY)?;
        let record = &file[place..locator];
        let is_sound = record.starts_with(b"PK\x06\x06") && number(&file[locator + 8..locator + 16]) == place as u64;
        let wide = [32, 40, 48].map(|at| number(&record[at..at + 8]));
        let most = [0xffff, WIDE, WIDE];
        let agree = (0..3).all(|i| numbers[i] == most[i] || numbers[i] == wide[i]);
        if !is_sound || !agree {
            return Err(NO_DIRECTORY);
        }
        (numbers, until) = (wide, place);
    }
    let [entries, size, start] = numbers;
    let bytes = usize::try_from(start).ok().and_then(|start| file.get(start..until)).ok_or(NO_DIRECTORY)?;
    let fits = bytes.len() as u64 == size && entries <= size / HEADER as u64;
    if fits { Ok(Directory { bytes, entries }) } else { Err(NO_DIRECTORY) }
}

/// Returns the place of an entry's bytes, from its header in the directory and the fields after its name.
fn place(file: &[u8], header: &[u8], fields: &[u8]) -> Option<Range<usize>> {
    let mut wide = wide_field(fields).chunks_exact(8).map(number);
    // The field holds those numbers that do not fit, in this order.
    let mut whole = |at: usize| {
        let narrow = number(&header[at..at + 4]);
        if narrow == WIDE { wide.next() } else { Some(narrow) }
    };
    let length = usize::try_from(whole(24)?).ok()?;
    let stored = usize::try_from(whole(20)?).ok()?;
    let local = usize::try_from(whole(42)?).ok()?;
    let local_header = file.get(local..local.checked_add(LOCAL_HEADER)?)?;
    if stored != length || !local_header.starts_with(b"PK\x03\x04") {
        return None;
    }
    let [name, fields] = [26, 28].map(|at| number(&local_header[at..at + 2]) as usize);
    let start = local + LOCAL_HEADER + name + fields;
    let end = start.checked_add(length)?;
    (end <= file.len()).then_some(start..end)
}

/// Returns the contents of the field with numbers of 64 bits; empty if there is none.
fn wide_field(mut fields: &[u8]) -> &[u8] {
    while let Some((header, rest)) = fields.split_first_chunk::<4>() {
        let [tag, length] = [&header[..2], &header[2..]].map(number);
        let Some((contents, after)) = rest.split_at_checked(length as usize) else { break };
        if tag == WIDE_FIELD {
            return contents;
        }
        fields = after;
    }
    &[]
}

/// Reads a little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}
