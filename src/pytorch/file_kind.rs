//! Names of files that PyTorch did not write, by how they begin.

/// Beginnings of files that are often taken for checkpoints, with what they are and what to do.
const KINDS: [(&[u8], &str); 10] = [
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself: fetch the file with `git lfs pull`, or download it again",
    ),
    (b"<!DOCTYPE", HTML),
    (b"<!doctype", HTML),
    (b"<html", HTML),
    (b"GGUF", "a GGUF file, whose weights are quantized: use the checkpoint that it was made from"),
    (b"\x89HDF", "an HDF5 file of Keras or another library: save the weights as safetensors"),
    (b"\x93NUMPY", "an array of numpy: save the weights as safetensors"),
    (b"\x1f\x8b", "compressed with gzip: decompress it first"),
    (b"BZh", "compressed with bzip2: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
];

const HTML: &str = "a web page, not a checkpoint: the download failed, so download it again";

/// Names the kind of a file that PyTorch did not write; `None` if it may be a checkpoint.
pub(super) fn foreign(file: &[u8]) -> Option<&'static str> {
    if let Some((_, kind)) = KINDS.iter().find(|(start, _)| file.starts_with(start)) {
        return Some(kind);
    }
    if file.get(257..262) == Some(b"ustar") {
        return Some(
            "a TAR archive: unpack it first; if PyTorch before 0.4 wrote it, load it with PyTorch and save it",
        );
    }
    let is_safetensors = file.get(8) == Some(&b'{')
        && file.first_chunk().is_some_and(|length| u64::from_le_bytes(*length) < file.len() as u64);
    is_safetensors.then_some("a safetensors file under another name: rename it to end in `.safetensors`")
}
