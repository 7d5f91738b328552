//! Tests of updates with NaN or infinity in the parameters.

use super::log::logged;
use super::*;
use crate::compute::cpu::{Layout, UpdateWeights};
use crate::device::Device;
use crate::tensor::NonFiniteElement;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::engine::{AveragesGuard, EngineConfig};
use crate::tracker::registry::OrderedViews;
use crate::tracker::writer::Pending;

fn options(dir: &std::path::Path) -> Options {
    PostHocEma::options(dir).update_every(1).checkpoint_every(3).snapshot_growth(None)
}

/// Returns the bits of all averages.
fn bits(ema: &PostHocEma) -> Vec<(Vec<u32>, Option<Vec<i16>>)> {
    let guard = ema.engine.values().unwrap();
    let bits = |averages: &Averages| averages.high.iter().map(|value| value.to_bits()).collect();
    guard.values().averages.iter().map(|averages| (bits(averages), averages.low.clone())).collect()
}

#[test]
fn update_with_a_bad_parameter_is_as_if_it_was_not_due() {
    for reaction in [None, Some(OnNonFinite::Raise), Some(OnNonFinite::Skip)] {
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let (_temp, dir) = scratch();
            let (_other, without) = scratch();
            let mut walk = Walk::new(3);
            let with_reaction = |options: Options| reaction.map_or(options.clone(), |r| options.on_non_finite(r));
            let mut ema = with_reaction(options(&dir)).create(&walk.model).unwrap();
            let mut expected = options(&without).create(&walk.model).unwrap();
            for time in 1..=8 {
                walk.step();
                if time != 3 {
                    assert_ne!(ema.update(&walk.model).unwrap(), UpdateOutcome::Skipped);
                    expected.update_at(time, &walk.model).unwrap();
                    continue;
                }
                let mut model = walk.model.clone();
                model[1].1[4] = bad;
                let before = bits(&ema);
                let updated = ema.update(&model);
                if reaction == Some(OnNonFinite::Skip) {
                    // The snapshot that is due holds the update before.
                    assert_eq!(updated.unwrap(), UpdateOutcome::Stored);
                } else {
                    let text = updated.unwrap_err().to_string();
                    for part in ["`b.weight`", "at element 4 at step 3", &f64::from(bad).to_string()] {
                        assert!(text.contains(part), "{text}");
                    }
                }
                assert_eq!(bits(&ema), before);
                assert_eq!((ema.step(), ema.history().last()), (3, Some(2)));
            }
            assert_eq!(bits(&ema), bits(&expected));
            assert_eq!(ema.history().times(), [1, 2, 4, 5, 6, 7, 8]);
            ema.finish().unwrap();
            drop(ema);
            let steps: Vec<u64> = Run::open(&dir).unwrap().snapshots().iter().map(|s| s.id.step).collect();
            assert_eq!(steps, [2, 6, 8, 2, 6, 8]);
            let resumed = with_reaction(PostHocEma::options(&dir)).resume(&walk.model).unwrap();
            assert_eq!(resumed.history().times(), [1, 2, 4, 5, 6, 7, 8]);
            assert_eq!(bits(&resumed), bits(&expected));
        }
    }
}

#[test]
fn nothing_is_stored_if_the_first_updates_are_left_out() {
    let (_temp, dir) = scratch();
    let bad = vec![("w", vec![f32::NAN; 3])];
    let mut ema = options(&dir).on_non_finite(OnNonFinite::Skip).create(&bad).unwrap();
    for _ in 0..4 {
        assert_eq!(ema.update(&bad).unwrap(), UpdateOutcome::Skipped);
    }
    assert!(ema.history().is_empty());
    assert!(matches!(ema.synthesize(Profile::sigma_rel(0.1).unwrap()), Err(Error::NoUpdate)));
    ema.update(&vec![("w", vec![1.0f32; 3])]).unwrap();
    assert_eq!(ema.history().times(), [5]);
    // Storing goes on at the next step that is due.
    assert_eq!(ema.update(&vec![("w", vec![1.0f32; 3])]).unwrap(), UpdateOutcome::Stored);
}

#[test]
fn skip_warns_once_for_updates_in_a_row() {
    let (_temp, dir) = scratch();
    let mut ema = options(&dir).on_non_finite(OnNonFinite::Skip).create(&vec![("w", vec![1.0f32; 3])]).unwrap();
    let log = logged(|| {
        for value in [1.0, f32::NAN, f32::NAN, 2.0, f32::INFINITY, f32::NAN, f32::NAN] {
            ema.update(&vec![("w", vec![1.0, value, 1.0])]).unwrap();
        }
    });
    let warnings: Vec<&String> = log.iter().filter(|line| line.contains("is left out")).collect();
    assert_eq!(warnings.len(), 2, "{log:?}");
    assert!(warnings[0].starts_with("WARN") && warnings[0].contains("step 2"), "{}", warnings[0]);
    assert!(warnings[1].contains("parameter `w` is inf at element 1") && warnings[1].contains("step 5"));
    assert_eq!(ema.history().times(), [1, 4]);
}

#[test]
fn ignored_and_copied_values_are_not_looked_at() {
    let (_temp, dir) = scratch();
    let model = vec![("mask", vec![f32::NEG_INFINITY; 3]), ("w", vec![1.0f32; 3])];
    let mut ema = options(&dir).copy(["mask"]).create(&model).unwrap();
    assert_eq!(ema.update(&model).unwrap(), UpdateOutcome::Updated);
    let (_temp, dir) = scratch();
    let mut ema = options(&dir).on_non_finite(OnNonFinite::Ignore).create(&model).unwrap();
    assert_eq!(ema.update(&model).unwrap(), UpdateOutcome::Updated);
    assert!(matches!(ema.save(), Err(Error::NonFinite { .. })));
}

/// Engine on the host that looks at parameters after the call, as one for parameters on a device.
struct Later(Box<dyn Engine>);

impl Engine for Later {
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        layout: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()> {
        self.0.fold(views, layout, weights, looks)
    }

    fn refused(&self) -> Result<Option<NonFiniteElement>> {
        self.0.refused()
    }

    fn looks_later(&self) -> bool {
        true
    }

    fn values(&self) -> Result<AveragesGuard<'_>> {
        self.0.values()
    }

    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        self.0.checkpoint(meta)
    }

    fn pending(&self) -> Option<&dyn Pending> {
        self.0.pending()
    }
}

/// Creates a run that looks later.
fn later(dir: &std::path::Path, reaction: OnNonFinite) -> PostHocEma {
    let model = vec![("w", vec![1.0f32; 3])];
    let mut ema = options(dir).checkpoint_every(10).on_non_finite(reaction).create(&model).unwrap();
    let config = EngineConfig::new(&ema.registry, &ema.settings);
    let engine = engine::start(dir, ema.registry.layout(), &[], Device::Cpu, config).unwrap();
    ema.engine = Box::new(Later(engine));
    ema
}

#[test]
fn late_look_is_reported_by_the_next_call_that_needs_it() {
    let step = |result: Result<()>| match result {
        Err(Error::NonFiniteParameter { step, .. }) => step,
        other => panic!("{other:?}"),
    };
    let model = |value: f32| vec![("w", vec![1.0, value, 3.0])];
    let (_temp, dir) = scratch();
    let mut ema = later(&dir, OnNonFinite::Raise);
    let update = |ema: &mut PostHocEma, value| ema.update(&model(value)).map(drop);
    update(&mut ema, f32::NAN).unwrap();
    assert_eq!(step(update(&mut ema, 1.0)), 1);
    update(&mut ema, f32::NAN).unwrap();
    // The history knows it before a call reports it.
    assert_eq!(ema.history().times(), [2]);
    assert_eq!(step(ema.save()), 3);
    assert_eq!(SavedState::of(&dir).unwrap().unwrap().updated, Some(2));
    ema.save().unwrap();
    update(&mut ema, f32::NAN).unwrap();
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert_eq!(step(ema.plan(profile.clone()).map(drop)), 4);
    ema.plan(profile).unwrap();
    for _ in 5..9 {
        update(&mut ema, 2.0).unwrap();
    }
    // Two of them in one call: that of the update before, and that of the snapshot, which holds step 8.
    update(&mut ema, f32::NAN).unwrap();
    assert_eq!(step(update(&mut ema, f32::NAN)), 9);
    assert_eq!(step(update(&mut ema, 1.0)), 10);
    ema.flush().unwrap();
    assert_eq!(Run::open(&dir).unwrap().snapshots()[0].id.step, 8);
    update(&mut ema, f32::NAN).unwrap();
    assert_eq!(step(ema.flush()), 12);
    ema.flush().unwrap();
    update(&mut ema, f32::NAN).unwrap();
    assert_eq!(step(ema.finish()), 13);
    ema.finish().unwrap();
    assert_eq!(ema.history().times(), [2, 5, 6, 7, 8, 11]);
}

#[test]
fn late_look_warns_once_in_a_row_and_at_the_end() {
    let (_temp, dir) = scratch();
    let model = |value: f32| vec![("w", vec![1.0, value, 3.0])];
    let log = logged(|| {
        let mut ema = later(&dir, OnNonFinite::Skip);
        for value in [1.0, f32::NAN, f32::NAN, 2.0, f32::NAN] {
            ema.update(&model(value)).unwrap();
        }
        assert_eq!(ema.history().times(), [1, 4]);
        ema.finish().unwrap();
    });
    let steps = |text: &str| log.iter().filter(|line| line.contains(text)).count();
    assert_eq!((steps("is left out"), steps("step 2 is left"), steps("step 5 is left")), (2, 1, 1), "{log:?}");
    let (_temp, dir) = scratch();
    let log = logged(|| {
        let mut ema = later(&dir, OnNonFinite::Raise);
        ema.update(&model(1.0)).unwrap();
        ema.save().unwrap();
        ema.update(&model(f32::NAN)).unwrap();
    });
    assert!(log.iter().any(|line| line.contains("NaN at element 1 at step 2")), "{log:?}");
}
