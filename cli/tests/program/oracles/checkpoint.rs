//! Checkpoints of PyTorch are never executed, and are imported whole or not at all.

use std::fs;

use posthoc_ema::snapshot::list;
use posthoc_ema::{Import, Profile, Run, Tool, verify};

use super::{check_error, scratch};

/// Imports a directory with a file of these bytes for each tool.
///
/// An error names the file and leaves nothing. An imported run passes verification.
pub fn check(bytes: &[u8]) {
    let dir = scratch();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("0.110.pt"), bytes).unwrap();
    for tool in [Tool::PytorchPosthocEma, Tool::EmaPytorch, Tool::NitrousEma] {
        let target = dir.path().join(tool.to_string());
        let import = Import::new(tool, vec![Profile::sigma_rel(0.1).unwrap()], 10);
        match import.write(&source, &target, None) {
            Err(error) => {
                check_error(&error, &source);
                let left = fs::read_dir(dir.path()).unwrap().count();
                assert!(!target.exists() && left == 1, "{left} entries are left of an import that failed: {error}");
            }
            Ok(imported) => {
                assert_eq!((imported.snapshots, list(&target).unwrap().len()), (1, 1));
                assert_eq!(verify(&target, &mut |_| ()).unwrap().findings.len(), 0);
                let run = Run::open(&target).unwrap();
                assert_eq!(run.snapshots()[0].id.step, imported.steps[0]);
                fs::remove_dir_all(&target).unwrap();
            }
        }
    }
}
