//! Predicted errors and `Noise::Auto`, on trainings whose exact averages are known.
//!
//! `--nocapture` prints the table of docs/explanation/noise.md.

use std::fmt::Write;

use crate::trajectories::{Chains, Movement, Training, rms_difference};
use posthoc_ema::{At, Dtype, Noise, Plan, PredictedError, Profile, Run};

const SIGMA_RELS: [f64; 8] = [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.28];

/// One target, with and without a regularisation.
struct Case {
    movement: Movement,
    dtype: Dtype,
    sigma_rel: f64,
    off: MeasuredPlan,
    auto: MeasuredPlan,
}

/// A plan with the measured error of its synthesis, relative to the weights.
struct MeasuredPlan {
    plan: Plan,
    error: f64,
}

impl MeasuredPlan {
    fn predicted(&self) -> PredictedError {
        self.plan.predicted.unwrap()
    }
}

/// Measures the errors of all targets.
fn measure_plans(training: &Training, run: &Run, noise: Noise) -> Vec<MeasuredPlan> {
    let profiles = SIGMA_RELS.map(|s| Profile::sigma_rel(s).unwrap());
    let plans = run.plans_with(&profiles, At::Latest, noise).unwrap();
    let mut measured = Vec::new();
    for (plan, exact) in plans.into_iter().zip(&training.targets) {
        let average = run.load(&plan).unwrap().get("weight").unwrap().to_vec::<f64>().unwrap();
        measured.push(MeasuredPlan { error: rms_difference(&average, exact) / training.size, plan });
    }
    measured
}

/// Returns the targets of every movement in every dtype.
fn cases(chains: Chains) -> Vec<Case> {
    let mut cases = Vec::new();
    for movement in Movement::all() {
        let training = Training::new(chains, movement, &SIGMA_RELS);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let dir = tempfile::tempdir().unwrap();
            training.write(dir.path(), dtype);
            let run = Run::open(dir.path()).unwrap();
            let off = measure_plans(&training, &run, Noise::Off);
            let auto = measure_plans(&training, &run, Noise::Auto);
            for ((off, auto), sigma_rel) in off.into_iter().zip(auto).zip(SIGMA_RELS) {
                cases.push(Case { movement, dtype, sigma_rel, off, auto });
            }
        }
    }
    println!("{}", table(chains, &cases));
    cases
}

fn table(chains: Chains, cases: &[Case]) -> String {
    let mut text = format!(
        "\n{chains:?}\n\n\
         | parameters | stored | sigma_rel | noise gain | error | predicted | auto: noise gain | error | predicted |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for Case { movement, dtype, sigma_rel, off, auto } in cases {
        write!(text, "| {} | {dtype:?} | {sigma_rel} ", movement.name).unwrap();
        for MeasuredPlan { plan, error } in [off, auto] {
            let predicted = plan.predicted.unwrap().total;
            write!(text, "| {:.1} | {error:.1e} | {predicted:.1e} ", plan.noise_gain).unwrap();
        }
        text += "|\n";
    }
    text
}

impl Case {
    fn name(&self) -> String {
        format!("{}, {:?}, {}", self.movement.name, self.dtype, self.sigma_rel)
    }

    /// Returns the ratio of the error without a regularisation to the rounding of a single 16-bit snapshot; 0 for f32.
    fn amplification(&self) -> f64 {
        let digits = match self.dtype {
            Dtype::F16 => 12,
            Dtype::BF16 => 9,
            _ => return 0.0,
        };
        self.off.error * 2f64.powi(digits)
    }

    /// Returns the ratio of the error without a regularisation to the error with one.
    fn improvement(&self) -> f64 {
        self.off.error / self.auto.error
    }

    /// Checks that `Noise::Auto` is not worse than `Noise::Off`, and equal to it if no regularisation is chosen.
    fn check_never_worse(&self) {
        // Snapshots do not show movement that comes and goes between them: it may be a little worse.
        let most = if self.movement.swing > 0.0 { 1.25 * self.off.error } else { self.off.error };
        assert!(self.auto.error <= most, "{}: {} {}", self.name(), self.auto.error, self.off.error);
        assert!(self.auto.plan.rho > 0.0 || self.auto.error == self.off.error, "{}", self.name());
        assert!(self.auto.predicted().total <= self.off.predicted().total, "{}", self.name());
    }

    /// Checks the prediction: within a factor of 2 for modelled movement, and not much too small otherwise.
    fn check_prediction(&self) {
        for measured in [&self.off, &self.auto] {
            let PredictedError { profile, rounding, total } = measured.predicted();
            assert!((profile.hypot(rounding) / total - 1.0).abs() < 1e-12);
            let ratio = total / measured.error;
            // The model bends straight lines a little, which matters for the longest averages.
            let checked = self.movement.is_modelled() && self.sigma_rel < 0.25;
            assert!(!checked || (0.5..2.0).contains(&ratio), "{}: {ratio}", self.name());
            // Movement that comes and goes between two snapshots cannot be predicted.
            assert!(ratio > 0.5 || self.movement.swing > 0.0, "{}: {ratio}", self.name());
        }
    }
}

#[test]
fn regularisation_improves_16_bit_snapshots_of_exact_averages() {
    for case in cases(Chains::Tracked) {
        case.check_never_worse();
        case.check_prediction();
        let rounding_dominates = case.movement.is_slow() && case.amplification() > 8.0;
        assert!(!rounding_dominates || case.improvement() > 3.0, "{}: {}", case.name(), case.improvement());
    }
}

/// Uses the chains of `tests/data/plans.json`, entry `foreign`.
#[test]
fn regularisation_improves_16_bit_snapshots_of_other_tools() {
    for case in cases(Chains::Counter) {
        case.check_never_worse();
        case.check_prediction();
        let rounding_dominates =
            case.off.plan.noise_gain > 200.0 && case.amplification() > 20.0 && case.movement.swing == 0.0;
        assert!(!rounding_dominates || case.improvement() > 10.0, "{}: {}", case.name(), case.improvement());
    }
}
