//! Predicted errors and `Noise::Auto`, on trainings whose exact averages are known. `--nocapture` prints the table.

use std::fmt::Write;

use crate::trajectories::{Chains, Movement, Training, rms_difference};
use posthoc_ema::{At, Dtype, Noise, Plan, PredictedError, Profile, Run};

const SIGMA_RELS: [f64; 8] = [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.28];

/// One target, with and without a regularisation.
struct Case {
    movement: Movement,
    dtype: Dtype,
    sigma_rel: f64,
    off: Blended,
    auto: Blended,
}

/// A synthesis and its measured error, relative to the weights.
struct Blended {
    plan: Plan,
    error: f64,
}

impl Blended {
    fn predicted(&self) -> PredictedError {
        self.plan.predicted.unwrap()
    }
}

/// The measured errors of all targets.
fn blended(training: &Training, run: &Run, noise: Noise) -> Vec<Blended> {
    let profiles = SIGMA_RELS.map(|s| Profile::sigma_rel(s).unwrap());
    let plans = run.plans_with(&profiles, At::Latest, noise).unwrap();
    let measure = |(plan, exact): (Plan, &Vec<f64>)| {
        let average = run.load(&plan).unwrap().get("weight").unwrap().to_vec::<f64>().unwrap();
        Blended { error: rms_difference(&average, exact) / training.size, plan }
    };
    plans.into_iter().zip(&training.targets).map(measure).collect()
}

/// Every movement in every dtype.
fn cases(chains: Chains) -> Vec<Case> {
    let mut cases = Vec::new();
    for movement in Movement::all() {
        let training = Training::new(chains, movement, &SIGMA_RELS);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let dir = tempfile::tempdir().unwrap();
            training.write(dir.path(), dtype);
            let run = Run::open(dir.path()).unwrap();
            let pairs = blended(&training, &run, Noise::Off).into_iter().zip(blended(&training, &run, Noise::Auto));
            let case = |((off, auto), sigma_rel)| Case { movement, dtype, sigma_rel, off, auto };
            cases.extend(pairs.zip(SIGMA_RELS).map(case));
        }
    }
    println!("{}", table(chains, &cases));
    cases
}

fn table(chains: Chains, cases: &[Case]) -> String {
    let mut text = format!(
        "\n{chains:?}\n\n| parameters | stored | sigma_rel | noise gain | error | predicted | auto: noise gain | error | predicted |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for Case { movement, dtype, sigma_rel, off, auto } in cases {
        write!(text, "| {} | {dtype:?} | {sigma_rel} ", movement.name).unwrap();
        for Blended { plan, error } in [off, auto] {
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

    /// How many times the rounding of a single 16-bit snapshot the error is without a regularisation; 0 for f32.
    fn amplified(&self) -> f64 {
        let digits = match self.dtype {
            Dtype::F16 => 12,
            Dtype::BF16 => 9,
            _ => return 0.0,
        };
        self.off.error * 2f64.powi(digits)
    }

    /// How many times smaller the error is with a regularisation.
    fn gain(&self) -> f64 {
        self.off.error / self.auto.error
    }

    /// Whatever moves, but to and fro: with a regularisation the average is never worse, and where there is none it is the same.
    fn check_never_worse(&self) {
        // What comes and goes between two snapshots is not seen in them: there it may be worse, though not by much.
        let most = if self.movement.swing > 0.0 { 1.25 * self.off.error } else { self.off.error };
        assert!(self.auto.error <= most, "{}: {} {}", self.name(), self.auto.error, self.off.error);
        assert!(self.auto.plan.rho > 0.0 || self.auto.error == self.off.error, "{}", self.name());
        assert!(self.auto.predicted().total <= self.off.predicted().total, "{}", self.name());
    }

    /// Where parameters move as the model has it, the prediction is right.
    fn check_prediction(&self) {
        for blended in [&self.off, &self.auto] {
            let PredictedError { profile, rounding, total } = blended.predicted();
            assert!((profile.hypot(rounding) / total - 1.0).abs() < 1e-12);
            let ratio = total / blended.error;
            // A straight line is taken to bend a little, which counts for the longest averages.
            let checked = self.movement.is_modelled() && self.sigma_rel < 0.25;
            assert!(!checked || (0.5..2.0).contains(&ratio), "{}: {ratio}", self.name());
            // Elsewhere it is rather too large than too small, but for what comes and goes between two snapshots.
            assert!(ratio > 0.5 || self.movement.swing > 0.0, "{}: {ratio}", self.name());
        }
    }
}

#[test]
fn exact_averages_in_16_bits_are_better_for_a_regularisation() {
    for case in cases(Chains::Tracked) {
        case.check_never_worse();
        case.check_prediction();
        let dominates = case.movement.is_slow() && case.amplified() > 8.0;
        assert!(!dominates || case.gain() > 3.0, "{}: {}", case.name(), case.gain());
    }
}

/// The chains of `tests/data/plans.json`, entry `foreign`.
#[test]
fn averages_of_other_tools_in_16_bits_are_much_better_for_a_regularisation() {
    for case in cases(Chains::Counter) {
        case.check_never_worse();
        case.check_prediction();
        let dominates = case.off.plan.noise_gain > 200.0 && case.amplified() > 20.0 && case.movement.swing == 0.0;
        assert!(!dominates || case.gain() > 10.0, "{}: {}", case.name(), case.gain());
    }
}
