//! Predicted errors of models whose tensors move differently.

use crate::trajectories::{Chains, Movement, Training, repeated, rms_difference, write_tensors};
use posthoc_ema::{At, Dtype, Noise, Plan, Profile, Run};

const BODY: usize = 120_000;
const SIGMA_RELS: [f64; 3] = [0.1, 0.21, 0.25];

/// A training of a body and a head, written as a run.
struct TwoTensors {
    _dir: tempfile::TempDir,
    run: Run,
    body: Training,
    head: Training,
    head_elements: usize,
}

/// Root mean square errors of one average, relative to the weights.
#[derive(Debug)]
struct Errors {
    body: f64,
    head: f64,
    whole: f64,
}

impl TwoTensors {
    /// Simulates random walks of given sizes.
    fn new(body: f64, head: f64, head_elements: usize, dtype: Dtype) -> TwoTensors {
        let walk = |walk| Training::new(Chains::Tracked, Movement { walk, ..Movement::still() }, &SIGMA_RELS);
        let (body, head) = (walk(body), walk(head));
        let dir = tempfile::tempdir().unwrap();
        write_tensors(dir.path(), dtype, &[("body", &body, BODY), ("head", &head, head_elements)]);
        let run = Run::open(dir.path()).unwrap();
        TwoTensors { _dir: dir, run, body, head, head_elements }
    }

    fn plans(&self, noise: Noise) -> Vec<Plan> {
        let profiles = SIGMA_RELS.map(|s| Profile::sigma_rel(s).unwrap());
        self.run.plans_with(&profiles, At::Latest, noise).unwrap()
    }

    /// Measures the errors of target `index`.
    fn errors(&self, plan: &Plan, index: usize) -> Errors {
        let average = self.run.load(plan).unwrap();
        let average = |name: &str| average.get(name).unwrap().to_vec::<f64>().unwrap();
        let body = rms_difference(&average("body"), &repeated(&self.body.targets[index], BODY));
        let head = rms_difference(&average("head"), &repeated(&self.head.targets[index], self.head_elements));
        let share = self.head_elements as f64 / (BODY + self.head_elements) as f64;
        let whole = |body: f64, head: f64| ((1.0 - share) * body * body + share * head * head).sqrt();
        Errors {
            body: body / self.body.size,
            head: head / self.head.size,
            whole: whole(body, head) / whole(self.body.size, self.head.size),
        }
    }

    /// Checks that predictions of the whole and of the worst tensor are right to a factor of 2.
    fn check_predictions(&self, plans: &[Plan]) {
        let head_share = self.head_elements as f64 / (BODY + self.head_elements) as f64;
        for (index, plan) in plans.iter().enumerate() {
            let errors = self.errors(plan, index);
            let worst = plan.worst_group.as_ref().unwrap();
            let (share, worst_error) = match worst.tensors[0].as_str() {
                "head" => (head_share, errors.head),
                _ => (1.0 - head_share, errors.body),
            };
            assert!(worst.tensors.len() == 1 && (worst.share / share - 1.0).abs() < 1e-9, "{worst:?}");
            assert!(worst_error > 0.5 * errors.head.max(errors.body), "{worst:?} {errors:?}");
            for (predicted, error) in [(plan.predicted.unwrap(), errors.whole), (worst.predicted, worst_error)] {
                let ratio = predicted.total / error;
                assert!((0.5..2.0).contains(&ratio), "{}: {ratio}, {errors:?}", plan.profile);
            }
        }
    }
}

#[test]
fn head_of_480_elements_is_predicted_and_not_made_worse() {
    let model = TwoTensors::new(0.005, 3.0, 480, Dtype::F16);
    let (off, auto) = (model.plans(Noise::Off), model.plans(Noise::Auto));
    model.check_predictions(&off);
    model.check_predictions(&auto);
    for (index, (off, auto)) in off.iter().zip(&auto).enumerate() {
        let (off, auto) = (model.errors(off, index), model.errors(auto, index));
        for (off, auto) in [(off.body, auto.body), (off.head, auto.head), (off.whole, auto.whole)] {
            assert!(auto <= 1.05 * off, "{index}: {auto} is more than {off}");
        }
    }
}

/// Four elements forbid what would make all others three times better. The plan names them, and its remedy works.
#[test]
fn tensor_that_holds_auto_back_is_named() {
    let model = TwoTensors::new(0.005, 0.3, 4, Dtype::F16);
    let (off, auto) = (model.plans(Noise::Off), model.plans(Noise::Auto));
    let index = 1;
    let plan = &auto[index];
    let held = plan.held_back.as_ref().expect("the head holds it back");
    assert!(held.tensors == ["head"] && held.rho > plan.rho, "{held:?}");
    assert!(held.predicted.total < 0.6 * plan.predicted.unwrap().total, "{held:?}");
    let forced = model.plans(Noise::Rho(held.rho)).remove(index);
    let (before, after) = (model.errors(plan, index), model.errors(&forced, index));
    assert!(after.whole < 0.7 * before.whole && after.head > 1.05 * before.head, "{before:?} {after:?}");
    assert!((0.5..2.0).contains(&(held.predicted.total / after.whole)), "{held:?} {after:?}");
    assert!(off.iter().all(|plan| plan.held_back.is_none()), "nothing was asked for");
    let alike = TwoTensors::new(0.005, 0.005, 480, Dtype::F16).plans(Noise::Auto);
    assert!(alike.iter().any(|plan| plan.rho > 0.0) && alike.iter().all(|plan| plan.held_back.is_none()));
}

#[test]
fn head_on_a_still_body_is_predicted() {
    for head in [480, 3600] {
        let model = TwoTensors::new(0.0, 3.0, head, Dtype::F32);
        model.check_predictions(&model.plans(Noise::Off));
    }
}

/// The sample has all elements of a small tensor, and a part of a large one.
#[test]
fn still_sample_does_not_speak_for_other_elements() {
    let still = Training::new(Chains::Tracked, Movement::still(), &SIGMA_RELS);
    let profiles = [Profile::sigma_rel(0.1).unwrap()];
    for (elements, is_predicted) in [(400, true), (BODY, false)] {
        let dir = tempfile::tempdir().unwrap();
        write_tensors(dir.path(), Dtype::F16, &[("weight", &still, elements)]);
        let run = Run::open(dir.path()).unwrap();
        for noise in [Noise::Off, Noise::Auto] {
            let plan = run.plans_with(&profiles, At::Latest, noise).unwrap().remove(0);
            assert_eq!((plan.predicted.is_some(), plan.rho), (is_predicted, 0.0), "{elements}");
        }
    }
}
