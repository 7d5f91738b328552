//! Imports of checkpoints that the tools wrote (`tests/data/foreign/make.py`), and of hand-made ones.

pub(crate) mod pt;
mod refused;

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use self::pt::Pt;
use super::*;
use crate::math::Profile;
use crate::planning::{At, Plan, read_chain};
use crate::run::Run;

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/foreign").join(case)
}

fn expected(case: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(fixture(case).join("expected.json")).unwrap()).unwrap()
}

fn powers(sigma_rels: &[f64]) -> Vec<Profile> {
    sigma_rels.iter().map(|&sigma_rel| Profile::sigma_rel(sigma_rel).unwrap()).collect()
}

fn import(from: Tool, sigma_rels: &[f64], update_every: u64) -> Import {
    Import::new(from, powers(sigma_rels), update_every)
}

/// Returns an import of two profiles with updates every 10 steps.
fn usual(from: Tool) -> Import {
    import(from, &[0.05, 0.28], 10)
}

/// Imports a folder; returns the folder of the run, and the report.
fn imported(import: &Import, source: &Path) -> (tempfile::TempDir, PathBuf, ImportReport) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("made/run");
    let imported = import.write(source, &dir, None).unwrap();
    (temp, dir, imported)
}

/// Returns the exact average of a trajectory by a power function over the updates, and how far the plan can be from it.
///
/// The bound is that of Cauchy and Schwarz, in the inner product of the solve. The weights sum to 1, so only the
/// movement about the mean counts.
pub(super) fn average(plan: &Plan, times: &[u64], value: impl Fn(f64) -> f64) -> (f64, f64) {
    let end = plan.at as f64;
    let interval = |k: usize| (times[k] - if k == 0 { 0 } else { times[k - 1] }) as f64;
    let share = |k: usize| {
        let before = if k == 0 { 0.0 } else { plan.profile.cumulative(times[k - 1] as f64, end) };
        plan.profile.cumulative(times[k] as f64, end) - before
    };
    let all = 0..times.len();
    let exact: f64 = all.clone().map(|k| share(k) * value(times[k] as f64)).sum();
    let norm: f64 = all.clone().map(|k| share(k).powi(2) / interval(k)).sum();
    let mean: f64 = all.clone().map(|k| interval(k) * value(times[k] as f64)).sum::<f64>() / end;
    let moved: f64 = all.map(|k| interval(k) * (value(times[k] as f64) - mean).powi(2)).sum();
    (exact, plan.relative_error * (norm * moved).sqrt())
}

/// Averages the ramp of the README, which is 0.82 at `sigma_rel` 0.15; the tool's own synthesis gives 0.24.
#[test]
fn ramp_average_is_exact_unlike_the_tool_s() {
    let (_temp, dir, report) = imported(&usual(Tool::PytorchPosthocEma), &fixture("ramp"));
    assert_eq!((report.snapshots, report.steps.len(), report.warnings.len()), (40, 20, 0));
    assert_eq!(report.steps[19], 20_000);
    let run = Run::open(&dir).unwrap();
    let times = run.history().unwrap().times();
    assert_eq!((times[0], times[1], times.len()), (100, 110, 1991));
    for (sigma_rel, about) in [(0.05, 0.947), (0.1, 0.888), (0.15, 0.820), (0.2, 0.739), (0.25, 0.633)] {
        let plan = run.plan(Profile::sigma_rel(sigma_rel).unwrap(), At::Latest).unwrap();
        let weights = run.load(&plan).unwrap().get("weight").unwrap().to_vec::<f32>().unwrap();
        let (exact, apart) = average(&plan, &times, |t| t / 20_000.0);
        // The tool's own f32 averages are good to some ulps, which the blend amplifies.
        let tolerance = apart + plan.noise_gain * 1e-7;
        assert!(tolerance < 0.03 && (exact - about).abs() < 1e-3, "{sigma_rel}: {exact}, within {tolerance}");
        for (weight, last) in weights.iter().zip([1.0, -2.0, 0.5, 3.0]) {
            let difference = f64::from(*weight) / last - exact;
            assert!(difference.abs() <= tolerance, "{sigma_rel}: {difference} from {exact}, within {tolerance}");
        }
    }
    let own = expected("ramp")["own synthesis at sigma_rel 0.15"][0].as_f64().unwrap();
    assert!((own - 0.244).abs() < 1e-3, "{own}");
}

/// Runs the tools' loops in f64 on `sin(t/100 + i)`; returns the average of parameter `i` at each call.
fn loops(gamma: f64, first: u64, every: u64, corrected: bool, calls: u64, i: usize) -> Vec<f64> {
    let mut average = 0.0;
    let mut counted = 0;
    let mut averages = vec![0.0];
    for call in 1..=calls {
        let value = (call as f64 / 100.0 + i as f64).sin();
        if call >= first {
            if counted % every == 0 {
                let own = (counted + 2) as f64;
                let beta = (1.0 - 1.0 / own).powf(gamma + 1.0);
                let later = (1.0 - 1.0 / (own + every as f64)).powf(gamma + 1.0);
                let beta = if corrected { (beta * later).powf(every as f64 / 2.0) } else { beta };
                average = if counted == 0 { value } else { average + (1.0 - beta) * (value - average) };
            }
            counted += 1;
        }
        averages.push(average);
    }
    averages
}

#[test]
fn chains_match_the_tools_loops() {
    let corrected = Import { step_size_correction: true, ..usual(Tool::NitrousEma) };
    for (case, options, first, calls, rounding) in [
        ("halves", import(Tool::PytorchPosthocEma, &[0.1, 0.25], 20), 100, 560, 1e-3),
        ("prefixed", usual(Tool::PytorchPosthocEma), 1, 200, 1e-5),
        ("ema", usual(Tool::EmaPytorch), 1, 205, 1e-3),
        ("nitrous", usual(Tool::NitrousEma), 1, 205, 1e-5),
        ("corrected", corrected, 1, 205, 1e-5),
    ] {
        let (_temp, dir, report) = imported(&options, &fixture(case));
        let run = Run::open(&dir).unwrap();
        let times = run.history().unwrap().times();
        for (i, snapshot) in run.snapshots().iter().enumerate() {
            let gamma = options.profiles[snapshot.id.index].as_gamma().unwrap();
            let call = calls * (i % report.steps.len() + 1) as u64;
            let updates: Vec<u64> = times.iter().copied().filter(|&time| time <= call).collect();
            assert_eq!(updates.last(), Some(&snapshot.id.step), "{case}: what file {call} contains");
            let (profile, chain, stored) = read_chain(snapshot).unwrap();
            assert_eq!(profile, options.profiles[snapshot.id.index]);
            assert_eq!(stored.unwrap().times(), updates);
            let shares = chain.weights(&updates);
            let (tensor, bytes) = snapshot.tensor("weight").unwrap();
            assert_eq!(tensor.shape, [2, 3]);
            for element in 0..6 {
                let ours: f64 =
                    shares.iter().zip(&updates).map(|(w, &t)| w * (t as f64 / 100.0 + element as f64).sin()).sum();
                let theirs = loops(gamma, first, options.update_every, options.step_size_correction, call, element);
                let stored = value(tensor.dtype, &bytes, element);
                assert!((ours - theirs[call as usize]).abs() < 1e-12, "{case} {call}: {ours}");
                assert!((stored - ours).abs() < rounding, "{case} {call}: {stored} is not {ours}");
            }
        }
        let plan = run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap();
        let weights = run.load(&plan).unwrap();
        let blended = weights.get("weight").unwrap();
        let (exact, apart) = average(&plan, &times, |t| (t / 100.0).sin());
        let difference = value(blended.dtype, &blended.bytes, 0) - exact;
        assert!(difference.abs() <= apart + plan.noise_gain * rounding, "{case}: {difference}, within {apart}");
    }
}

fn value(dtype: Dtype, bytes: &[u8], element: usize) -> f64 {
    let size = dtype.bitsize() / 8;
    match crate::pytorch::number(dtype, &bytes[element * size..(element + 1) * size]).unwrap() {
        crate::pytorch::Number::Whole(value) => value as f64,
        crate::pytorch::Number::Rounded(value, _) => value,
    }
}

/// Checks that the comparison of chains above would notice wrong options.
#[test]
fn wrong_options_give_other_chains() {
    let own = expected("nitrous");
    let corrected = expected("corrected");
    assert_ne!(own, corrected);
    let gamma = Profile::sigma_rel(0.05).unwrap().as_gamma().unwrap();
    let with = loops(gamma, 1, 10, true, 820, 0);
    let without = loops(gamma, 1, 10, false, 820, 0);
    assert!((with[820] - without[820]).abs() > 0.1);
    assert!((loops(gamma, 1, 20, false, 820, 0)[820] - without[820]).abs() > 0.01);
}

#[test]
fn tensors_of_every_dtype_shape_and_stride_are_in_c_order() {
    let (_temp, dir, _) = imported(&usual(Tool::PytorchPosthocEma), &fixture("dtypes"));
    let run = Run::open(&dir).unwrap();
    let expected = expected("dtypes");
    // Both profiles: the second file is of the format before PyTorch 1.6.
    for snapshot in run.snapshots() {
        assert_eq!(snapshot.tensors().count(), 9);
        for (name, dtype, shape) in [
            ("plain", Dtype::F32, vec![6, 8]),
            ("transposed", Dtype::F32, vec![4, 3]),
            ("channels_last", Dtype::F32, vec![2, 3, 4, 2]),
            ("scalar", Dtype::F32, vec![]),
            ("bf16", Dtype::BF16, vec![5]),
            ("f16", Dtype::F16, vec![5]),
            ("f64", Dtype::F64, vec![5]),
            ("i64", Dtype::I64, vec![1, 2]),
            ("empty", Dtype::F32, vec![0, 3]),
        ] {
            let (tensor, bytes) = snapshot.tensor(name).unwrap();
            assert_eq!((tensor.dtype, &tensor.shape), (dtype, &shape), "{name}");
            let values: Vec<f64> = (0..shape.iter().product()).map(|i| value(dtype, &bytes, i)).collect();
            let wanted = expected[name].as_array().unwrap();
            assert_eq!(values, wanted.iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>(), "{name}");
        }
    }
}

#[test]
fn strides_and_booleans_are_read_as_pytorch_reads_them() {
    let temp = tempfile::tempdir().unwrap();
    let counting: Vec<u8> = (0..6).flat_map(|i: i32| i.to_le_bytes()).collect();
    let pt = Pt::with_step(1).tensor("mask", "BoolStorage", &[3], &[1, 0, 1]).floats("w", &[1.0]);
    pt.strided("columns", "IntStorage", 6, &[2, 3], &[1, 2], &counting).save(temp.path().join("0.100.pt"));
    let (_temp, dir, _) = imported(&import(Tool::PytorchPosthocEma, &[0.1], 10), temp.path());
    let run = Run::open(&dir).unwrap();
    let snapshot = &run.snapshots()[0];
    let (mask, bytes) = snapshot.tensor("mask").unwrap();
    assert_eq!((mask.dtype, &*bytes), (Dtype::BOOL, &[1, 0, 1][..]));
    let (columns, bytes) = snapshot.tensor("columns").unwrap();
    let values: Vec<f64> = (0..6).map(|i| value(columns.dtype, &bytes, i)).collect();
    assert_eq!(values, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
}

#[test]
fn rounded_counts_become_integers_and_infinite_ones_warn() {
    let (_temp, dir, report) = imported(&import(Tool::PytorchPosthocEma, &[0.1, 0.25], 20), &fixture("halves"));
    let name = "norm.num_batches_tracked";
    let run = Run::open(&dir).unwrap();
    let (tensor, bytes) = run.snapshots()[3].tensor(name).unwrap();
    assert_eq!((tensor.dtype, value(tensor.dtype, &bytes, 0)), (Dtype::I64, 2240.0));
    assert!(report.warnings.is_empty(), "{report:?}");

    let temp = tempfile::tempdir().unwrap();
    let half =
        |pt: Pt, name: &str, value: f32| pt.tensor(name, "HalfStorage", &[], &half::f16::from_f32(value).to_le_bytes());
    for (call, count) in [(1000, 1000.0), (70_000, 70_000.0)] {
        let pt = half(half(Pt::default(), "initted", 1.0), "step", call as f32);
        let pt = half(half(pt, "ema_model.a.num_batches_tracked", count), "ema_model.b.num_batches_tracked", 2.5);
        half(pt, "ema_model.w", 0.5).save(temp.path().join(format!("0.{call}.pt")));
    }
    let (_temp, dir, report) = imported(&import(Tool::EmaPytorch, &[0.1], 10), temp.path());
    assert_eq!(report.steps, [991, 69_991]);
    assert!(report.warnings.len() == 1 && report.warnings[0].starts_with("`a.num_batches_tracked` is infinite"));
    let run = Run::open(&dir).unwrap();
    let of = |snapshot: usize, name: &str| {
        let (tensor, bytes) = run.snapshots()[snapshot].tensor(name).unwrap();
        (tensor.dtype, value(tensor.dtype, &bytes, 0))
    };
    assert_eq!(of(0, "a.num_batches_tracked"), (Dtype::I64, 1000.0));
    assert_eq!(of(1, "a.num_batches_tracked"), (Dtype::I64, 69_991.0));
    // A fraction is not a count.
    assert_eq!(of(0, "b.num_batches_tracked"), (Dtype::F16, 2.5));
}

#[test]
fn constant_norm_statistics_warn() {
    let (_temp, _, report) = imported(&usual(Tool::PytorchPosthocEma), &fixture("prefixed"));
    assert!(
        report.warnings.len() == 1 && report.warnings[0].starts_with("`norm.running_mean` is the same"),
        "{report:?}"
    );
    for case in ["ema", "nitrous"] {
        let tool = if case == "ema" { Tool::EmaPytorch } else { Tool::NitrousEma };
        assert!(imported(&usual(tool), &fixture(case)).2.warnings.is_empty(), "{case}");
    }
}

/// Writes three steps of two profiles. The first is that of the first update, at which both averages are equal.
fn three_steps(dir: &Path, more: impl Fn(Pt, i64) -> Pt) {
    for (call, index) in [(100, 0), (100, 1), (200, 0), (200, 1), (300, 0), (300, 1)] {
        let average = if call == 100 { 0.0 } else { call as f32 / (index + 2) as f32 };
        let pt = Pt::with_step(call - 99).floats("w", &[average]);
        more(pt, call).save(dir.join(format!("{index}.{call}.pt")));
    }
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect()
}

#[test]
fn copied_tensors_are_marked_as_copied() {
    let temp = tempfile::tempdir().unwrap();
    three_steps(temp.path(), |pt, call| {
        let overflow = halves(&[f32::INFINITY, 1.0]);
        pt.floats("moved", &[call as f32])
            .floats("mask", &[0.0, f32::NEG_INFINITY])
            .floats("other", &[f32::INFINITY])
            .floats("spoiled", &[f32::NAN, 0.0])
            .floats("frozen", &[1.5])
            .tensor("table", "HalfStorage", &[2], &overflow)
            .tensor("ids", "HalfStorage", &[3], &halves(&[0.0, 2048.0, 4096.0]))
            .tensor("small", "HalfStorage", &[2], &halves(&[0.0, 2048.0]))
    });
    let (_temp, dir, report) = imported(&usual(Tool::PytorchPosthocEma), temp.path());
    let warnings = |start: &str| report.warnings.iter().filter(|text| text.starts_with(start)).count();
    for start in [
        "`moved` is alike for all profiles at every step",
        "`mask`, `other` are infinite in places and alike for all profiles: copied",
        "`spoiled` is left out: NaN in every checkpoint",
        "`table` is infinite in places and alike for all profiles: copied, not averaged; in 16 bits",
        "`ids` is constant and whole",
    ] {
        assert_eq!(warnings(start), 1, "{start}: {report:?}");
    }
    assert_eq!(report.warnings.len(), 5, "{report:?}");
    let run = Run::open(&dir).unwrap();
    for snapshot in run.snapshots() {
        assert!(
            snapshot.meta.copied.iter().eq(["ids", "mask", "moved", "other", "table"]),
            "{:?}",
            snapshot.meta.copied
        );
        assert!(snapshot.tensor("spoiled").is_none());
    }
    let plan = run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap();
    let tensors = run.load(&plan).unwrap();
    let values = |name: &str| tensors.get(name).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(values("moved"), [300.0]);
    assert_eq!(values("mask"), [0.0, f32::NEG_INFINITY]);
    assert!((values("frozen")[0] - 1.5).abs() < 1e-5);
}

/// A tensor that is alike at the first update alone, or at some steps only, was averaged.
#[test]
fn tensors_alike_at_some_steps_only_are_averaged() {
    let temp = tempfile::tempdir().unwrap();
    three_steps(temp.path(), |pt, _| pt);
    let (_temp, dir, report) = imported(&usual(Tool::PytorchPosthocEma), temp.path());
    assert!(report.warnings.is_empty(), "{report:?}");
    assert!(Run::open(&dir).unwrap().snapshots().iter().all(|snapshot| snapshot.meta.copied.is_empty()));
    for call in [200, 300] {
        (0..2).for_each(|index| fs::remove_file(temp.path().join(format!("{index}.{call}.pt"))).unwrap());
    }
    let (_temp, dir, report) = imported(&usual(Tool::PytorchPosthocEma), temp.path());
    assert!(report.warnings.is_empty() && Run::open(&dir).unwrap().snapshots()[0].meta.copied.is_empty());
    // Alike at the newest step, but not at the one before.
    for (call, index, value) in [(200, 0, 1.0), (200, 1, 2.0), (300, 0, 3.0), (300, 1, 3.0)] {
        let pt = Pt::with_step(call - 99).floats("w", &[value]);
        pt.save(temp.path().join(format!("{index}.{call}.pt")));
    }
    let (_temp, dir, report) = imported(&usual(Tool::PytorchPosthocEma), temp.path());
    assert!(report.warnings.is_empty() && Run::open(&dir).unwrap().snapshots()[0].meta.copied.is_empty());
}

/// With one profile, only constants are recognised.
#[test]
fn infinite_constant_of_a_single_profile_is_copied() {
    let temp = tempfile::tempdir().unwrap();
    for call in [100, 200] {
        let pt = Pt::with_step(call - 99).floats("w", &[call as f32]).floats("mask", &[f32::NEG_INFINITY]);
        pt.save(temp.path().join(format!("0.{call}.pt")));
    }
    let (_temp, dir, report) = imported(&import(Tool::PytorchPosthocEma, &[0.1], 10), temp.path());
    assert!(report.warnings.len() == 1 && report.warnings[0].starts_with("`mask` is infinite"), "{report:?}");
    assert!(Run::open(&dir).unwrap().snapshots()[1].meta.copied.iter().eq(["mask"]));
}

#[test]
fn unconfirmed_update_after_step_warns() {
    let temp = tempfile::tempdir().unwrap();
    let half = |pt: Pt, name: &str, value: f32| pt.tensor(name, "HalfStorage", &[], &halves(&[value]));
    let file = |call: u64, counted: f32| {
        let pt = half(half(Pt::default(), "initted", 1.0), "step", counted).floats("w", &[call as f32]);
        pt.save(temp.path().join(format!("0.{call}.pt")));
    };
    file(80_000, f32::INFINITY);
    let options = import(Tool::PytorchPosthocEma, &[0.1], 10);
    let warnings = |options: &Import| imported(options, temp.path()).2.warnings;
    assert!(warnings(&options)[0].starts_with("update_after_step is taken to be 100, the default: "));
    let given = warnings(&Import { update_after_step: Some(0), ..options.clone() });
    assert!(given[0].starts_with("update_after_step is taken to be 0, as given: "), "{given:?}");
    // One exact count is enough.
    file(1000, 901.0);
    assert!(warnings(&options).is_empty());
}

#[test]
fn run_appears_whole() {
    let temp = tempfile::tempdir().unwrap();
    let target = temp.path().join("deep/run");
    let seen = std::sync::Mutex::new(Vec::new());
    let look = |_| {
        let beside = fs::read_dir(temp.path().join("deep")).unwrap();
        let names = beside.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        seen.lock().unwrap().extend(names);
    };
    usual(Tool::EmaPytorch).write(fixture("ema"), &target, Some(&look)).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|name| name.starts_with(".posthoc-ema-import-")), "{seen:?}");
    assert_eq!(fs::read_dir(temp.path().join("deep")).unwrap().count(), 1);
    // Checks that its mode is that of any new directory.
    let mode = |dir: &Path| std::os::unix::fs::PermissionsExt::mode(&fs::metadata(dir).unwrap().permissions());
    assert_eq!(mode(&target), mode(&temp.path().join("deep")));
}

#[test]
fn repeated_files_of_one_update_are_dropped() {
    let temp = tempfile::tempdir().unwrap();
    for (call, value) in [(100, 1.0), (105, 1.0), (110, 2.0)] {
        Pt::with_step(call - 99).floats("w", &[value]).save(temp.path().join(format!("0.{call}.pt")));
    }
    fs::write(temp.path().join("model.pt"), "of no concern").unwrap();
    fs::write(temp.path().join("forged\u{202e}\nok.pt"), "of no concern").unwrap();
    let (_temp, dir, report) = imported(&import(Tool::PytorchPosthocEma, &[0.1], 10), temp.path());
    assert_eq!(report.steps, [100, 110]);
    assert!(report.warnings.iter().any(|text| text.starts_with("model.pt is left out")));
    assert!(report.warnings.iter().any(|text| text.starts_with("forged\\u{202e}\\nok.pt is left out")));
    assert!(report.warnings.iter().any(|text| text.starts_with("0.105.pt is left out: it is the average of 0.100.pt")));
    assert_eq!(Run::open(&dir).unwrap().snapshots().len(), 2);
    // Other values cannot be of the same update: the options are wrong.
    Pt::with_step(6).floats("w", &[1.5]).save(temp.path().join("0.105.pt"));
    let error = import(Tool::PytorchPosthocEma, &[0.1], 10).write(temp.path(), dir.join("x"), None).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("0.105.pt: tensor `w` differs") && text.contains("check update_every"), "{text}");
}

#[test]
fn source_is_unchanged_and_progress_counts_every_byte() {
    let state = |dir: &Path| {
        let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let about = |path: &PathBuf| (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap());
        let about: Vec<_> = files.iter().map(about).collect();
        (files, about, fs::metadata(dir).unwrap().modified().unwrap())
    };
    let before = state(&fixture("ema"));
    let read = std::sync::atomic::AtomicU64::new(0);
    let count = |bytes| {
        read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    let temp = tempfile::tempdir().unwrap();
    let report = usual(Tool::EmaPytorch).write(fixture("ema"), temp.path(), Some(&count)).unwrap();
    assert_eq!(state(&fixture("ema")), before);
    // 15 elements of two bytes in each of the files.
    assert_eq!(read.into_inner(), 8 * 30);
    let written: u64 = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(report.bytes, written);
    // The files belong to one run, and another import is another run.
    let id = |dir: &Path| Run::open(dir).unwrap().snapshots()[0].meta.run.clone().unwrap();
    let (_temp, other, _) = imported(&usual(Tool::EmaPytorch), &fixture("ema"));
    assert_ne!(id(temp.path()), id(&other));
}
