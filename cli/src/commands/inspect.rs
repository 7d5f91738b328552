//! `posthoc-ema inspect`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use posthoc_ema::snapshot::{self, Extension, SetAside, Snapshot, SnapshotId};
use posthoc_ema::{Error, Profile, Run, SavedState, describe_cuda_devices, shown};
use serde_json::json;

use super::output::{bytes, print, print_json};
use super::plot::PlotArgs;
use super::{Failure, Outcome};
use crate::pictures::{self, Timeline, TimelineRow};
use crate::tables;

/// Show a run's snapshots, profiles, sizes and health
///
/// A picture shows the snapshots over the steps of the training, a row for each profile, with the damaged ones crossed,
/// the newest update and the live state.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: PathBuf,
    #[command(flatten)]
    plot: PlotArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A snapshot, or the reason why it could not be opened.
struct Entry {
    id: SnapshotId,
    opened: Result<Snapshot, String>,
}

/// Shows the snapshots of a run, damaged ones beside the sound ones.
pub fn run(arguments: &Arguments) -> Outcome {
    arguments.plot.check()?;
    let listed = snapshot::list_each(&arguments.run)?;
    let entries: Vec<Entry> = listed.into_iter().map(|(id, files)| open(id, files)).collect();
    // Errors of the run as a whole, such as an empty directory.
    let error = Run::open(&arguments.run).err().or_else(|| SavedState::of(&arguments.run).err());
    let problem = error.map(|error| error.to_string());
    if arguments.json {
        print_json(&document(&arguments.run, &entries, problem.as_deref()));
    } else if !entries.is_empty() {
        print(&table(&entries).to_string());
        print(&summary(&arguments.run, &entries));
        extensions(&entries).iter().for_each(|extension| print(&extension_text(extension)));
        cuda_devices().iter().for_each(|(device, described)| print(&format!("{device}: {described}")));
    }
    if !arguments.json {
        snapshot::set_aside(&arguments.run)?.iter().for_each(|left| print(&left_course(left)));
    }
    let drawn = if entries.is_empty() { Ok(()) } else { draw(arguments, &entries) };
    match (problem, drawn) {
        (Some(problem), Err(error)) => Err(Failure::Unhealthy(format!("{problem}\nerror: {error}"))),
        (Some(problem), Ok(())) => Err(Failure::Unhealthy(problem)),
        (None, drawn) => Ok(drawn?),
    }
}

fn open(id: SnapshotId, files: Result<Vec<PathBuf>, Error>) -> Entry {
    Entry { id, opened: files.and_then(|files| Snapshot::open(id, &files)).map_err(|error| error.to_string()) }
}

/// Returns the CUDA devices that can synthesize from the run: each with its product name, driver and kernels, or the
/// reason why there is none. A program without CUDA lists none.
fn cuda_devices() -> Vec<(String, String)> {
    match describe_cuda_devices() {
        Ok(devices) => devices.into_iter().enumerate().map(|(i, text)| (format!("cuda:{i}"), text)).collect(),
        Err(why) if cfg!(feature = "cuda") => vec![("cuda".to_owned(), why)],
        Err(_) => Vec::new(),
    }
}

/// Returns the name of a snapshot's profile, or its metadata if they cannot be parsed.
fn profile(snapshot: &Snapshot) -> String {
    let profile: Result<Profile, _> = serde_json::from_str(&snapshot.meta.profile);
    profile.map_or_else(|_| shown(&snapshot.meta.profile), |profile| profile.to_string())
}

fn dtypes(snapshot: &Snapshot) -> BTreeSet<String> {
    snapshot.tensors().map(|(_, tensor)| tensor.dtype.to_string()).collect()
}

fn elements(snapshot: &Snapshot) -> usize {
    snapshot.tensors().map(|(_, tensor)| tensor.shape.iter().product::<usize>()).sum()
}

fn table(entries: &[Entry]) -> comfy_table::Table {
    let mut table =
        tables::table(&["snapshot", "profile", "step", "size", "files", "tensors", "parameters", "dtypes", "health"]);
    for Entry { id, opened } in entries {
        let mut row = vec![id.to_string()];
        match opened {
            Ok(snapshot) => row.extend([
                profile(snapshot),
                id.step.to_string(),
                bytes(snapshot.len()),
                snapshot.files().len().to_string(),
                snapshot.tensors().count().to_string(),
                elements(snapshot).to_string(),
                dtypes(snapshot).into_iter().collect::<Vec<_>>().join(" "),
                "ok".into(),
            ]),
            Err(_) => {
                row.extend(["?".into(), id.step.to_string()]);
                row.extend(["", "", "", "", "", "damaged"].map(String::from));
            }
        }
        table.add_row(row);
    }
    table
}

fn total_bytes(entries: &[Entry]) -> u64 {
    entries.iter().filter_map(|entry| entry.opened.as_ref().ok()).map(Snapshot::len).sum()
}

fn summary(run: &Path, entries: &[Entry]) -> String {
    let steps: BTreeSet<u64> = entries.iter().map(|entry| entry.id.step).collect();
    let range = match (steps.first(), steps.last()) {
        (Some(first), Some(last)) => format!("steps {first} to {last}"),
        _ => "no step".into(),
    };
    let state = match SavedState::of(run) {
        Ok(Some(state)) => format!("live state {}", bytes(state.bytes)),
        Ok(None) => "no live state: the run cannot be resumed".into(),
        Err(error) => format!("the live state is damaged: {error}"),
    };
    format!("{} snapshots at {} steps ({range}), {}; {state}", entries.len(), steps.len(), bytes(total_bytes(entries)))
}

/// Returns the changes of the run's tensors, the oldest first.
fn extensions(entries: &[Entry]) -> &[Extension] {
    let opened = entries.iter().filter_map(|entry| entry.opened.as_ref().ok());
    let longest = opened.map(|snapshot| snapshot.meta.extensions.as_slice()).max_by_key(|extensions| extensions.len());
    longest.unwrap_or_default()
}

fn extension_text(extension: &Extension) -> String {
    let names = |names: &BTreeSet<String>| names.iter().map(shown).collect::<Vec<_>>().join(", ");
    let parts = [("begins", &extension.begun), ("ends", &extension.ended), ("has another dtype", &extension.retyped)];
    let parts = parts.into_iter().filter(|(_, tensors)| !tensors.is_empty());
    let parts: Vec<String> = parts.map(|(what, tensors)| format!("{what}: {}", names(tensors))).collect();
    format!("extended at step {}; {}", extension.at, parts.join("; "))
}

/// Describes a folder of snapshots that are set aside. They are not an error.
pub(super) fn left_course(SetAside { path, snapshots, has_state }: &SetAside) -> String {
    let steps: BTreeSet<u64> = snapshots.iter().map(|id| id.step).collect();
    let range = match (steps.first(), steps.last()) {
        (Some(first), Some(last)) => format!(" of steps {first} to {last}"),
        _ => String::new(),
    };
    let state = if *has_state { " and a live state" } else { "" };
    format!(
        "{}: {} snapshots{range}{state} of a course that was left are set aside; the next snapshot of the run removes \
         them",
        shown(path),
        snapshots.len()
    )
}

fn draw(arguments: &Arguments, entries: &[Entry]) -> Result<(), Error> {
    let timeline = timeline(&arguments.run, entries);
    arguments.plot.draw(|path| pictures::draw_timeline(path, &timeline))
}

fn timeline(run: &Path, entries: &[Entry]) -> Timeline {
    let state = SavedState::of(run).ok().flatten();
    let indices: BTreeSet<usize> = entries.iter().map(|entry| entry.id.index).collect();
    let name = run.file_name().unwrap_or(run.as_os_str());
    let newest = entries.iter().filter(|entry| entry.opened.is_ok()).map(|entry| entry.id.step).max();
    Timeline {
        title: format!("{}: {} snapshots, {}", name.to_string_lossy(), entries.len(), bytes(total_bytes(entries))),
        rows: indices.into_iter().map(|index| timeline_row(index, entries)).collect(),
        newest_update: newest.max(state.and_then(|state| state.updated)),
        state: state.map(|state| (state.step, bytes(state.bytes))),
    }
}

/// Returns the row of one profile, whose name is in any snapshot that can be read.
fn timeline_row(index: usize, entries: &[Entry]) -> TimelineRow {
    let row: Vec<&Entry> = entries.iter().filter(|entry| entry.id.index == index).collect();
    let sound: Vec<&Snapshot> = row.iter().filter_map(|entry| entry.opened.as_ref().ok()).collect();
    let mut note = Vec::new();
    if let Some(largest) = sound.iter().map(|snapshot| snapshot.len()).max() {
        note.push(format!("{} × {}", sound.len(), bytes(largest)));
    }
    if row.len() > sound.len() {
        note.push(format!("{} damaged", row.len() - sound.len()));
    }
    TimelineRow {
        label: sound.first().map_or_else(|| format!("profile {index}"), |snapshot| profile(snapshot)),
        snapshots: row.iter().map(|entry| (entry.id.step, entry.opened.is_ok())).collect(),
        note: note.join(", "),
    }
}

fn document(run: &Path, entries: &[Entry], problem: Option<&str>) -> serde_json::Value {
    let snapshots: Vec<_> = entries.iter().map(entry_json).collect();
    let state = SavedState::of(run).ok().flatten();
    let state = state.map(|state| json!({ "step": state.step, "bytes": state.bytes }));
    json!({
        "run": run,
        "snapshots": snapshots,
        "bytes": total_bytes(entries),
        "state": state,
        "aside": aside_json(run),
        "trouble": problem,
        "extensions": extensions(entries),
        "cuda": cuda_devices().into_iter().collect::<BTreeMap<_, _>>(),
    })
}

/// Returns the folders of snapshots that are set aside.
pub(super) fn aside_json(run: &Path) -> Vec<serde_json::Value> {
    let describe = |left: SetAside| {
        let snapshots: Vec<_> = left.snapshots.iter().map(|id| json!({ "index": id.index, "step": id.step })).collect();
        json!({ "path": left.path, "snapshots": snapshots, "state": left.has_state })
    };
    snapshot::set_aside(run).unwrap_or_default().into_iter().map(describe).collect()
}

fn entry_json(Entry { id, opened }: &Entry) -> serde_json::Value {
    match opened {
        Err(reason) => json!({ "index": id.index, "step": id.step, "trouble": reason }),
        Ok(snapshot) => json!({
            "index": id.index,
            "step": id.step,
            "profile": serde_json::from_str::<serde_json::Value>(&snapshot.meta.profile).ok(),
            "files": snapshot.files().iter().map(|file| file.path()).collect::<Vec<_>>(),
            "bytes": snapshot.len(),
            "tensors": snapshot.tensors().count(),
            "parameters": elements(snapshot),
            "dtypes": dtypes(snapshot),
            "trouble": null,
        }),
    }
}
