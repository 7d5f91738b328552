//! Bits of sharded runs: those of a run in one process, whatever the tiling and the number of processes.

use super::model::GlobalSpec;
use super::*;

fn target() -> Profile {
    Profile::sigma_rel(0.15).unwrap()
}

#[test]
fn any_tiling_has_the_bits_of_one_process() {
    let (_a, alone) = scratch();
    let mut whole = twin(options(&alone), 11);
    let live = whole.synthesize(target()).unwrap();
    whole.finish().unwrap();
    for cut in CUTS {
        for n in [1, 2, 3, 4, 8] {
            let what = format!("{cut:?} on {n}");
            let (_b, dir) = scratch();
            let mut all = Processes::open(&options(&dir), cut, n);
            all.train(11);
            // An update of all processes costs that of one, without the replicas.
            let entries = all.trackers.iter().flat_map(|ema| ema.registry.averaged());
            let sum: usize = entries.map(|entry| entry.shape.iter().product::<usize>()).sum();
            let once: usize = MODEL.iter().filter(|global| global.dtype != Dtype::I64).map(GlobalSpec::elements).sum();
            // The scalar is on all processes.
            let scalars = if cut == Cut::Stages { 0 } else { n - 1 };
            assert!(cut == Cut::Replicas || sum == once + scalars, "{what}: {sum}");
            for (i, ema) in all.trackers.iter().enumerate() {
                let own = ema.synthesize(target()).unwrap();
                let shard = Shard::new(cut, i, n, 0);
                for (held, expected) in shard.0.iter().zip(cut_out(&live, &shard)) {
                    let tensor = own.get(MODEL[held.global].name).unwrap();
                    assert_eq!(tensor.shape, held.shape, "{what}");
                    assert!(tensor.bytes == expected, "{what}: {}", MODEL[held.global].name);
                }
            }
            all.finish();
            assert_same_snapshots(&dir, &alone, &what);
        }
    }
}

#[test]
fn evaluation_of_parts_restores_every_bit() {
    let (_a, alone) = scratch();
    let whole = twin(options(&alone), 10).synthesize(target()).unwrap();
    let (_b, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Grid, 4);
    all.train(10);
    for (i, ema) in all.trackers.iter().enumerate() {
        let mut shard = Shard::new(Cut::Grid, i, 4, 10);
        let trained = shard.clone();
        let expected = cut_out(&whole, &shard);
        let swapped = ema.swap_in(target(), &mut shard).unwrap();
        assert!(swapped.0.iter().zip(&expected).all(|(held, expected)| held.bytes == *expected));
        swapped.restore().unwrap();
        assert_eq!(shard, trained);
        // Switch EMA leaves the tensors that are copied.
        ema.switch_to(target(), &mut shard).unwrap();
        assert!(shard.0.iter().zip(&expected).all(|(held, expected)| held.bytes == *expected));
        let plan = ema.plan(target()).unwrap();
        assert_eq!(plan.weights, all.trackers[0].plan(target()).unwrap().weights);
        assert_eq!(plan.no_prediction, Some(crate::planning::NoPrediction::Parts));
    }
    all.abandon();
}

#[test]
fn resume_on_other_processes_keeps_bits() {
    let (_a, alone) = scratch();
    let (_b, dir) = scratch();
    let legs = [
        (Cut::Rows, 4),
        (Cut::Columns, 2),
        (Cut::Flat, 3),
        (Cut::Whole, 1),
        (Cut::Grid, 8),
        (Cut::Whole, 1),
        (Cut::Replicas, 4),
        (Cut::Stages, 3),
        (Cut::Rows, 2),
    ];
    let mut whole = twin(options(&alone), 0);
    let mut step = 0;
    for (leg, (cut, n)) in legs.into_iter().enumerate() {
        step += 4;
        let what = format!("leg {leg}: {cut:?} on {n}");
        train_whole(&mut whole, step);
        whole.save().unwrap();
        if cut == Cut::Whole {
            let mut ema = twin(options(&dir), step);
            assert_eq!(ema.step(), step, "{what}");
            ema.save().unwrap();
            if leg == 3 {
                ema.finish().unwrap();
                whole.finish().unwrap();
            }
            ema.abandon();
        } else {
            let mut all = Processes::open(&options(&dir), cut, n);
            all.train(step);
            all.save();
            all.abandon();
        }
        assert_same_snapshots(&dir, &alone, &what);
        let states: Vec<String> = names(&dir).into_iter().filter(|name| name.starts_with("state")).collect();
        let count = if cut == Cut::Whole { 1 } else { roles(&options(&dir), cut, n)[0].ranks };
        assert_eq!(states.len(), count, "{what}: {states:?}");
        let saved = crate::run::SavedState::of(&dir).unwrap().unwrap();
        assert_eq!((saved.step, saved.updated), (step, Some(step)), "{what}");
    }
    let found = crate::run::verify(&dir, &mut |_| ()).unwrap();
    assert!(found.findings.is_empty(), "{:?}", found.findings);
    // The live averages have the same bits, too.
    let whole = whole.synthesize(target()).unwrap();
    let ema = options(&dir).resume(&Shard::new(Cut::Whole, 0, 1, 0)).unwrap();
    assert_eq!(ema.synthesize(target()).unwrap(), whole);
}
