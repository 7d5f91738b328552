//! `posthoc-ema plan --advise`.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::report;
use posthoc_ema::{Advice, AdviceRequest, Dtype, Retention, advise};
use serde_json::json;

use super::args::Before;
use super::list::Count;
use super::output::{bytes, print, print_json, round_bar};
use super::targets::usage;
use super::{Failure, Outcome};

/// Shows what profiles, spacing and number of snapshots a disk is best spent on, beside half and twice the disk.
pub fn run(before: &Before, disk: Count, as_json: bool) -> Outcome {
    let wish = wish(before, disk)?;
    let bar = round_bar();
    bar.set_message("trying profiles and spacings");
    let done = AtomicU64::new(0);
    let advice = advise(&wish, &|all| {
        bar.set_length(all as u64);
        bar.set_position(done.fetch_add(1, Ordering::Relaxed) + 1);
    });
    bar.finish_and_clear();
    let advice = advice.map_err(usage)?;
    let best = best(&advice, wish.disk);
    if as_json {
        print_json(&json!({ "advice": advice, "best": best }));
        return Ok(());
    }
    print(&report::advice(&advice).to_string());
    if let Some(best) = best {
        print(&sentence(best, wish.disk));
    }
    Ok(())
}

fn wish(before: &Before, disk: Count) -> Result<AdviceRequest, Failure> {
    let missing = |what: &str| Failure::Usage(format!("--advise needs {what}"));
    let Retention::Range { from, to } = before.retention.0 else {
        return Err(missing("the range of lengths that will be asked for: --retention FROM..TO"));
    };
    Ok(AdviceRequest {
        steps: before.steps.ok_or_else(|| missing("the length of the training: --steps"))?,
        update_every: before.update_every,
        update_after_step: before.update_after_step,
        parameters: before.parameters.ok_or_else(|| missing("the size of the model: --parameters"))?.0,
        dtype: before.checkpoint_dtype.map_or(Dtype::F32, Dtype::from),
        disk: disk.0,
        range: (from, to),
    })
}

/// The smallest worst error within the disk.
fn best(advice: &[Advice], disk: u64) -> Option<&Advice> {
    let fitting = advice.iter().filter(|advice| advice.disk <= disk);
    fitting.min_by(|a, b| a.worst.error.total_cmp(&b.worst.error))
}

fn sentence(Advice { forecast, disk, .. }: &Advice, given: u64) -> String {
    format!(
        "Within {}: track {}, checkpoint_every {}, max_checkpoints {} ({} on disk at most)",
        bytes(given),
        report::lengths(&forecast.tracked),
        forecast.schedule.checkpoint_every,
        forecast.keep,
        bytes(*disk)
    )
}
