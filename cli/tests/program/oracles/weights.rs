//! Weights that other libraries wrote: averages of two equal checkpoints, in memory and in a file.

use std::fs;
use std::path::{Path, PathBuf};

use posthoc_ema::{At, Checkpoints, Profile, Tensors};
use safetensors::SafeTensors;

use super::{check_error, scratch};

/// Averages two files of PyTorch with these bytes.
pub fn check_file(bytes: &[u8]) {
    let dir = scratch();
    let paths = [1, 2].map(|step| dir.path().join(format!("model-{step}.pt")));
    paths.iter().for_each(|path| fs::write(path, bytes).unwrap());
    check(dir.path(), &paths);
}

/// Averages two folders of `torch.distributed.checkpoint`: a list of contents, and one file of rectangles.
pub fn check_distributed(bytes: &[u8]) {
    check_folders(bytes, |_| [".metadata", "__0_0.distcp"]);
}

/// Averages two checkpoints of DeepSpeed that one process saved: the state of the module, and of the optimizer. The
/// first byte is odd for stage 3.
pub fn check_deepspeed(bytes: &[u8]) {
    let module = ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"];
    check_folders(bytes, |flag| [module[usize::from(flag & 1)], "zero_pp_rank_0_mp_rank_00_optim_states.pt"]);
}

/// Splits the bytes into two files: a byte that chooses their names, the length of the first in four bytes, and both.
/// An empty second file is left out.
fn check_folders(bytes: &[u8], names: impl Fn(u8) -> [&'static str; 2]) {
    let Some((&[flag, a, b, c, d], rest)) = bytes.split_first_chunk() else { return };
    let length = (u32::from_le_bytes([a, b, c, d]) as usize).min(rest.len());
    let files = rest.split_at(length);
    let dir = scratch();
    let paths = [1, 2].map(|step| dir.path().join(format!("step-{step}")));
    for path in &paths {
        fs::create_dir(path).unwrap();
        let [first, second] = names(flag);
        fs::write(path.join(first), files.0).unwrap();
        if !files.1.is_empty() {
            fs::write(path.join(second), files.1).unwrap();
        }
    }
    check(dir.path(), &paths);
}

/// Checks that an error names a file, and that the average in memory is the one in a file.
fn check(dir: &Path, paths: &[PathBuf]) {
    let checkpoints = match Checkpoints::open(paths, Some(&[1, 2])) {
        Ok(checkpoints) => checkpoints,
        Err(error) => return check_error(&error, dir),
    };
    let merge = checkpoints.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let path = dir.join("mean.safetensors");
    let written = checkpoints.write(&[(&merge, &path)], &Default::default());
    match (checkpoints.load(&merge), written) {
        (Ok(loaded), Ok(_)) => assert_same(&loaded, &fs::read(&path).unwrap()),
        // Some names are not those of a safetensors file.
        (Ok(_), Err(error)) => assert!(error.to_string().contains("`__metadata__`"), "{error}"),
        (Err(_), Err(_)) => assert!(!path.exists()),
        (Err(error), Ok(_)) => panic!("written, but not loaded: {error}"),
    }
}

fn assert_same(loaded: &Tensors, file: &[u8]) {
    let written = SafeTensors::deserialize(file).unwrap();
    assert_eq!(loaded.len(), written.len());
    for (name, tensor) in loaded.iter() {
        let other = written.tensor(name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape.as_slice()), (other.dtype(), other.shape()), "{name}");
        assert!(tensor.bytes == other.data(), "{name}");
    }
}
