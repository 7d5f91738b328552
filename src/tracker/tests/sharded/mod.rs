//! Sharded runs: several trackers in one test stand for the processes.

mod bad_input;
mod bits;
mod courses;
mod model;
mod reading;
mod storage;

use super::*;
use crate::tracker::agreement::{ShardManifest, ShardRole, agree};
use model::{CUTS, Cut, MODEL, Shard};

/// Returns a directory in memory if possible, since these tests sync thousands of times.
fn scratch() -> (TempDir, PathBuf) {
    let memory = Path::new("/dev/shm");
    let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(3).checkpoint_dtype(Dtype::F16);
    options.snapshot_growth(None).max_checkpoints(3).checkpoint_in_background(false)
}

/// Returns the roles of all processes.
fn roles(options: &Options, cut: Cut, n: usize) -> Vec<ShardRole> {
    let manifest = |i| options.manifest(i, &Shard::new(cut, i, n, 0)).unwrap();
    agree(&(0..n).map(manifest).collect::<Vec<ShardManifest>>()).unwrap()
}

/// Processes of a sharded run.
struct Processes {
    cut: Cut,
    trackers: Vec<PostHocEma>,
}

impl Processes {
    /// Opens the run as all processes do, one after the other.
    fn open(options: &Options, cut: Cut, n: usize) -> Processes {
        Processes::open_with(options, cut, n, |options, model| options.resume_or_create(model))
    }

    fn open_with(
        options: &Options,
        cut: Cut,
        n: usize,
        open: impl Fn(Options, &Shard) -> Result<PostHocEma>,
    ) -> Processes {
        let roles = roles(options, cut, n);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|&i| (roles[i].rank != Some(0), i));
        let mut trackers: Vec<(usize, PostHocEma)> = Vec::new();
        for i in order {
            let tracker = open(options.clone().role(roles[i].clone()), &Shard::new(cut, i, n, 0));
            trackers.push((i, tracker.unwrap_or_else(|error| panic!("{cut:?} {i} of {n}: {error}"))));
        }
        trackers.sort_by_key(|(i, _)| *i);
        Processes { cut, trackers: trackers.into_iter().map(|(_, tracker)| tracker).collect() }
    }

    /// Trains until a step. The processes take turns in another order at each step.
    fn train(&mut self, until: u64) {
        let n = self.trackers.len();
        while self.trackers[0].step() < until {
            let step = self.trackers[0].step() + 1;
            for place in 0..n {
                let i = (place + step as usize) % n;
                self.trackers[i].update(&Shard::new(self.cut, i, n, step)).unwrap();
            }
        }
    }

    fn save(&self) {
        self.trackers.iter().for_each(|tracker| tracker.save().unwrap());
    }

    fn finish(mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.finish().unwrap());
    }

    /// Ends all at once, as a kill does.
    fn abandon(self) {
        self.trackers.into_iter().for_each(PostHocEma::abandon);
    }
}

/// Tracks the whole model in one process.
fn twin(options: Options, until: u64) -> PostHocEma {
    let mut ema = options.resume_or_create(&Shard::new(Cut::Whole, 0, 1, 0)).unwrap();
    train_whole(&mut ema, until);
    ema
}

fn train_whole(ema: &mut PostHocEma, until: u64) {
    while ema.step() < until {
        ema.update(&Shard::new(Cut::Whole, 0, 1, ema.step() + 1)).unwrap();
    }
}

/// Checks that two runs have the same snapshots, bit for bit.
fn assert_same_snapshots(found: &Path, expected: &Path, what: &str) {
    let [found, expected] = [found, expected].map(|dir| Run::open(dir).unwrap());
    let ids = |run: &Run| run.snapshots().iter().map(|snapshot| snapshot.id).collect::<Vec<_>>();
    assert_eq!(ids(&found), ids(&expected), "{what}");
    for (own, other) in found.snapshots().iter().zip(expected.snapshots()) {
        for global in MODEL {
            let [(own, bytes), (other, expected)] = [own, other].map(|snapshot| snapshot.tensor(global.name).unwrap());
            assert_eq!((own.dtype, &own.shape), (other.dtype, &other.shape), "{what}: {}", global.name);
            assert!(bytes == expected, "{what}: {}", global.name);
        }
        assert_eq!(own.meta.dtypes, other.meta.dtypes, "{what}");
        assert_eq!(own.meta.copied, other.meta.copied, "{what}");
        assert_eq!(own.meta.history, other.meta.history, "{what}");
    }
}

/// Returns the bytes of a part of each tensor of a whole model.
fn cut_out(whole: &Tensors, shard: &Shard) -> Vec<Vec<u8>> {
    let of = |held: &model::HeldPart| {
        let tensor = whole.get(MODEL[held.global].name).unwrap();
        let size = tensor.dtype.bitsize() / 8;
        held.indices().into_iter().flat_map(|i| tensor.bytes[i * size..(i + 1) * size].to_vec()).collect()
    };
    shard.0.iter().map(of).collect()
}

/// Names of the files in a directory, without locks.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}
