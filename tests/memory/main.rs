//! Bounds on memory: synthesis, averages and imports of models larger than the bound, measured in a process of its own.

mod adapters;
#[cfg(feature = "pytorch")]
mod inputs;
#[cfg(feature = "pytorch")]
mod torch_files;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use posthoc_ema::{At, Dtype, Output, PostHocEma, Profile, Run, WriteOptions};

/// Lock of the tests, which measure the memory of the whole process.
static MEASURED: Mutex<()> = Mutex::new(());

/// Returns the anonymous memory of this process in bytes, without mapped files.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Runs a function, and returns its result and the most anonymous memory that the process had meanwhile.
fn most_anonymous<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(anonymous(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        let result = act();
        done.store(true, Ordering::Relaxed);
        result
    });
    (result, most.into_inner())
}

/// Writes two snapshots of a model of 300 MB, more than twice the bound.
fn train(dir: &std::path::Path) {
    let mut model = vec![("large", vec![1.0f32; 70_000_000]), ("small", vec![1.0f32; 5_000_000])];
    let options = PostHocEma::options(dir).sigma_rels([0.2]).update_every(1).checkpoint_every(1);
    let mut ema = options.checkpoint_dtype(Dtype::F16).create(&model).unwrap();
    for _ in 0..2 {
        model.iter_mut().for_each(|(_, values)| values.iter_mut().step_by(1000).for_each(|v| *v += 1.0));
        ema.update(&model).unwrap();
    }
}

#[test]
fn four_targets_of_a_large_model_take_less_than_128_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    let run = Run::open(&dir).unwrap();
    let profiles: Vec<Profile> = [0.1, 0.15, 0.2, 0.25].map(|s| Profile::sigma_rel(s).unwrap()).to_vec();
    let plans = run.plans(&profiles, At::Latest).unwrap();
    let paths: Vec<PathBuf> = (0..plans.len()).map(|i| temp.path().join(i.to_string())).collect();
    let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
    let options = WriteOptions { dtype: Some(Dtype::F32), ..WriteOptions::default() };
    let (written, most) = most_anonymous(|| run.write_all(&outputs, &options));
    written.unwrap();
    // A single result is larger than the bound.
    assert_eq!(std::fs::metadata(&paths[0]).unwrap().len(), 4096 + 300_000_000);
    assert!(most > 0 && most < 128 << 20, "{most}");
}
