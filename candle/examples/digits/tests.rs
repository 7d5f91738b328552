//! Runs the whole example on a short training, whose losses do not matter.

use std::fs;

use super::*;

fn args(out: PathBuf, force: bool) -> Args {
    Args { out, steps: 305, seed: 1, force, evaluate: None, draws: 1 }
}

#[test]
fn short_training_writes_all_output_and_replaces_only_its_own_by_force() -> Result<()> {
    let temp = tempfile::tempdir()?;
    let out = temp.path().join("digits");
    let losses = run(&args(out.clone(), false))?;
    assert!(losses.averages.iter().all(|(average, loss)| loss.is_finite() && average.path.is_file()));
    assert_eq!(losses.averages.len(), 32);
    assert!(fs::read_to_string(out.join("loss.svg"))?.contains("best average"));
    assert!(fs::read(out.join("digits.png"))?.starts_with(b"\x89PNG"));

    fs::write(out.join("averages/mine.txt"), "mine")?;
    let refused = run(&args(out.clone(), false)).err().map(|error| error.to_string());
    assert!(refused.is_some_and(|text| text.contains("--force")));
    let again = run(&args(out.clone(), true))?;
    let bits = |losses: &Losses| losses.averages.iter().map(|(_, loss)| loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&again), bits(&losses));
    assert_eq!(fs::read_to_string(out.join("averages/mine.txt"))?, "mine");

    fs::remove_file(out.join("digits.txt"))?;
    let refused = run(&args(out, true)).err().map(|error| error.to_string());
    assert!(refused.is_some_and(|text| text.contains("not written by this example")));
    Ok(())
}
