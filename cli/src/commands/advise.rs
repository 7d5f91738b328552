//! `posthoc-ema plan --advise`.

use std::sync::atomic::{AtomicU64, Ordering};

use posthoc_ema::{Advice, AdviceRequest, At, Noise, PredictedError, Retention, advise};
use serde_json::json;

use super::forecast::{ExpectedMovement, ForecastArgs};
use super::list::Count;
use super::open::OpenArgs;
use super::output::{bytes, print, print_json, round_bar};
use super::{Failure, Outcome};
use crate::tables;

/// Shows the best profiles, spacing and number of snapshots for a disk, and for half and twice that disk.
pub fn run(arguments: &ForecastArgs, open: &OpenArgs, disk: Count, as_json: bool) -> Outcome {
    let request = request(arguments, disk)?;
    let movement = arguments.movement(open)?;
    let bar = round_bar();
    bar.set_message("trying profiles and spacings");
    let done = AtomicU64::new(0);
    let advice = advise(&request, &|all| {
        bar.set_length(all as u64);
        bar.set_position(done.fetch_add(1, Ordering::Relaxed) + 1);
    });
    bar.finish_and_clear();
    let advice = advice.map_err(Failure::of_argument)?;
    let best = best(&advice, request.disk);
    let predicted: Vec<Option<PredictedError>> =
        advice.iter().map(|advice| worst_predicted(advice, &movement, &request)).collect::<Result<_, _>>()?;
    if as_json {
        print_json(&json!({ "advice": advice, "best": best, "predicted": predicted }));
        return Ok(());
    }
    print(&tables::advice(&advice, &predicted).to_string());
    if let Some(best) = best {
        print(&recommendation(best, request.disk));
    }
    Ok(())
}

fn request(arguments: &ForecastArgs, disk: Count) -> Result<AdviceRequest, Failure> {
    let missing = |option: &str| Failure::Usage(format!("--advise needs {option}"));
    let Retention::Range { from, to } = arguments.retention.0 else {
        return Err(missing("the range of lengths that will be asked for: --retention FROM..TO"));
    };
    let schedule = arguments.schedule();
    Ok(AdviceRequest {
        steps: arguments.steps.ok_or_else(|| missing("the length of the training: --steps"))?,
        update_every: schedule.update_every,
        update_after_step: schedule.update_after_step,
        snapshot_growth: schedule.snapshot_growth,
        parameters: arguments.parameters.ok_or_else(|| missing("the size of the model: --parameters"))?.0,
        dtype: arguments.dtype(),
        disk: disk.0,
        range: (from, to),
    })
}

/// Returns the largest predicted error over the range of lengths, at the end of the training; `None` if the movement is
/// unknown.
fn worst_predicted(
    advice: &Advice,
    movement: &ExpectedMovement,
    request: &AdviceRequest,
) -> Result<Option<PredictedError>, Failure> {
    let targets = advice.lengths(request)?;
    let plans = movement.plans(&advice.forecast, &targets, At::Latest, Noise::Off, request.dtype)?;
    let predicted = plans.iter().filter_map(|plan| plan.predicted);
    Ok(predicted.max_by(|a, b| a.total.total_cmp(&b.total)))
}

/// Returns the advice with the smallest worst error within the disk.
fn best(advice: &[Advice], disk: u64) -> Option<&Advice> {
    let fitting = advice.iter().filter(|advice| advice.disk <= disk);
    fitting.min_by(|a, b| a.worst.error.total_cmp(&b.worst.error))
}

fn recommendation(Advice { forecast, disk, .. }: &Advice, available: u64) -> String {
    format!(
        "Within {}: track {}, checkpoint_every {}, max_checkpoints {} ({} on disk at most)",
        bytes(available),
        tables::lengths(&forecast.tracked),
        forecast.schedule.checkpoint_every,
        forecast.keep,
        bytes(*disk)
    )
}
