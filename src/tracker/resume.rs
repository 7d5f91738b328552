//! Resuming a run, from its own live state or from one that the training stored elsewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::engine::{self, Engine, EngineConfig};
use super::extend::{self, StateValues};
use super::non_finite::{NonFinitePolicy, OnNonFinite};
use super::options::register;
use super::registry::TensorRegistry;
use super::rewind::Course;
use super::shard_place::Sharding;
use super::tensor_choice::TensorChoice;
use super::{Options, PostHocEma, state};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::fs::{Lock, start_threads};
use crate::run::{LiveState, Run, Settings, StateDocument, check_snapshots, newest_state, saved_files};
use crate::snapshot::{self, Extension, FileOf, ListedFile, Session, list_files};
use crate::tensor::{Parameters, TensorView};

impl Options {
    /// Resumes a run from its newest live state; [`PostHocEma::step`] returns the step of that state.
    ///
    /// Schedule, retention, dtype and shard size may change; profiles, precision and the choice of tensors may not.
    ///
    /// # Errors
    /// * [`Error::NoRun`] if the directory holds no live state.
    /// * [`Error::Setting`] for an option that contradicts the run.
    /// * [`Error::Changed`] or [`Error::Tensor`] for parameters that differ from the run's.
    /// * [`Error::Unexpected`] for snapshots of another run.
    /// * [`Error::Damaged`], [`Error::Locked`], [`Error::LockedHere`], [`Error::Io`], [`Error::Threads`] and
    ///   [`Error::Cuda`].
    pub fn resume(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        self.check_sharding()?;
        if newest_state(&self.dir)?.is_none() {
            return Err(self.no_state());
        }
        start_threads()?;
        let lock = self.lock()?;
        if self.repairs() {
            snapshot::recover(&self.dir)?;
        }
        let Some(files) = newest_state(&self.dir)? else { return Err(self.no_state()) };
        let saved = self.read_state(&files)?;
        let model = self.prepare(&saved, params)?;
        let sessions = self.check_stored(&saved)?;
        let model = self.start(model)?;
        self.go_on(saved.document, model, sessions, lock)
    }

    /// Reads a live state and verifies its data. The processes of a sharded run share the files out.
    fn read_state(&self, files: &[PathBuf]) -> Result<LiveState> {
        let number = self.shard.as_ref().map(Sharding::number);
        LiveState::read(files, |i| number.is_none_or(|number| number.rank == Some(i % number.ranks)))
    }

    /// Resumes a run from a live state that [`PostHocEma::save_to`] wrote, such as one beside the training's own
    /// checkpoint. `path` is its file, or the folder that it was saved into.
    ///
    /// The averages go on with the bits of a training that never left that state. Snapshots and states of the run that
    /// it did not lead to are set aside in `aside` within the run: nothing reads them any more. They are removed once
    /// the new course has stored a snapshot. Until then, a state of the course that was left brings its snapshots back.
    /// A process that is killed leaves either the old course whole or the new one, from which [`Options::resume`] goes
    /// on.
    ///
    /// Snapshots that retention has removed since the state was saved are not there any more; averages are made of
    /// those that are. A directory without a run becomes one. Options that are not set are those of the state.
    ///
    /// # Errors
    /// * [`Error::NoState`] if the file does not exist.
    /// * [`Error::Unexpected`] if the directory holds another run than that of the state.
    /// * Those of [`Options::resume`]. Nothing has changed, except after an [`Error::Io`]: the next resume then
    ///   completes what was begun.
    pub fn resume_from(self, path: impl AsRef<Path>, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        self.check_sharding()?;
        let files = saved_files(path.as_ref())?;
        start_threads()?;
        let saved = self.read_state(&files)?;
        let model = self.prepare(&saved, params)?;
        if self.repairs() {
            self.create_dir()?;
        }
        let lock = self.lock()?;
        if self.repairs() {
            snapshot::recover(&self.dir)?;
        }
        let course = Course::survey(&self.dir, &saved)?;
        let model = self.start(model)?;
        if self.repairs() {
            course.take(&self.dir)?;
        }
        self.check_stored(&saved)?;
        self.go_on(saved.document, model, course.sessions, lock)
    }

    /// Returns the settings and the tensors of a resume, which must be those of the live state.
    fn prepare(&self, saved: &LiveState, params: &(impl Parameters + ?Sized)) -> Result<Prepared> {
        let settings = self.settings(saved.document.settings.clone())?;
        settings.check()?;
        saved.document.settings.check_unchanged(&settings)?;
        if !self.extend {
            saved.document.settings.check_same_choice(&settings)?;
        }
        let (registry, places) = register(params, |views| self.resumed(saved, &settings, views))?;
        let non_finite = NonFinitePolicy::new(self.on_non_finite, self.shard.is_some());
        let (values, extensions) = self.resumed_values(saved, &settings, &registry, params)?;
        Ok(Prepared { settings, registry, places, non_finite, values, extensions })
    }

    /// Registers the tensors of a resumed run. Known ones keep their roles, unless an extension chooses again.
    fn resumed(&self, saved: &LiveState, settings: &Settings, views: &[TensorView<'_>]) -> Result<TensorRegistry> {
        let choice = TensorChoice::new(settings)?;
        let was_averaged = |name: &str| saved.was_averaged(name);
        if !self.extend {
            return TensorRegistry::resumed(views, &choice, &saved.document.tied, &was_averaged, self.shard.as_ref());
        }
        let is_known = |name: &str| saved.was_averaged(name).is_some();
        // The run's own patterns may name tensors that end, so only new ones are checked.
        if self.average.is_some() || self.copy.is_some() || self.leave_out.is_some() {
            choice.check(views)?;
            return TensorRegistry::extended(views, &choice, &|_| None, is_known);
        }
        TensorRegistry::extended(views, &choice, &was_averaged, is_known)
    }

    /// Returns the values of a resumed run, and the changes of its tensors.
    fn resumed_values(
        &self,
        saved: &LiveState,
        settings: &Settings,
        registry: &TensorRegistry,
        params: &(impl Parameters + ?Sized),
    ) -> Result<(StateValues, Vec<Extension>)> {
        let mut extensions = saved.document.extensions.clone();
        if !self.extend {
            state::check_tensors(saved, registry, self.shard.is_none())?;
            return Ok((state::read_values(saved, registry, settings, &BTreeSet::new())?, extensions));
        }
        state::check_header(registry, settings)?;
        let change = extend::change(saved, registry);
        // Before the first update, all tensors begin with the run.
        if saved.document.history.is_empty() {
            return Ok((state::read_values(saved, registry, settings, &change.begun)?, extensions));
        }
        let values = extend::values(saved, registry, settings, &change.begun, params)?;
        if self.on_non_finite != OnNonFinite::Ignore {
            extend::check_finite(&values, registry, &change.begun)?;
        }
        extensions.extend((!change.is_empty()).then_some(change));
        Ok((values, extensions))
    }

    /// Starts an engine with the averages of a live state.
    fn start(&self, model: Prepared) -> Result<Started> {
        let Prepared { settings, registry, places, non_finite, values, extensions } = model;
        let config = EngineConfig {
            values: Some(values),
            device_copy: self.device_copy,
            ..EngineConfig::new(&registry, &settings)
        };
        let engine = engine::start(&self.dir, registry.layout(), &places, self.device, config)?;
        if self.in_background {
            engine.prepare();
        }
        Ok(Started { settings, registry, non_finite, extensions, engine })
    }

    /// Begins a session that goes on from the run's live state, after session number `sessions`.
    fn go_on(self, document: StateDocument, model: Started, sessions: u64, lock: Lock) -> Result<PostHocEma> {
        let lineage = document.earlier_sessions();
        let mut tracker = PostHocEma {
            dir: self.dir.clone(),
            shard: self.shard.as_ref().map(Sharding::number),
            kept: BTreeSet::new(),
            resumed_at: Some(document.clock),
            engine: model.engine,
            settings: model.settings,
            registry: model.registry,
            extensions: model.extensions,
            clock: document.clock,
            settled: document.history,
            newest: None,
            stored: document.stored,
            needs_retry: false,
            run_id: document.run,
            session: document.session,
            lineage,
            in_background: self.in_background,
            on_error: self.on_error,
            is_abandoned: false,
            non_finite: model.non_finite,
            lock,
        };
        if self.repairs() {
            snapshot::remove_leftovers(&tracker.dir)?;
        }
        tracker.find_kept()?;
        tracker.complete()?;
        tracker.session = Some(self.begin_session(sessions, tracker.settled.last().unwrap_or(0)));
        Ok(tracker)
    }

    /// Checks the stored snapshots against the live state, and returns the number of the newest session.
    fn check_stored(&self, saved: &LiveState) -> Result<u64> {
        let state = &saved.document;
        let number = |session: &Option<Session>| session.as_ref().map_or(0, |session| session.number);
        if snapshot::list(&self.dir)?.is_empty() {
            return Ok(number(&state.session));
        }
        let run = Run::open(&self.dir)?;
        check_snapshots(&run, saved)?;
        // A version that stores no session may have written the state after newer sessions.
        let stored = run.snapshots().iter().map(|snapshot| number(&snapshot.meta.session));
        Ok(stored.chain([number(&state.session)]).max().unwrap_or(0))
    }

    /// Resumes the run if the directory holds a live state, and creates a new one otherwise: for jobs that restart.
    ///
    /// # Errors
    /// Those of [`Options::create`] and [`Options::resume`].
    pub fn resume_or_create(self, params: &(impl Parameters + ?Sized)) -> Result<PostHocEma> {
        if newest_state(&self.dir)?.is_some() {
            return self.resume(params);
        }
        self.remove_unfinished()?;
        self.create(params)
    }

    /// Removes what a sharded run wrote that was killed before its first live state was complete.
    fn remove_unfinished(&self) -> Result<()> {
        let is_state = |file: &ListedFile| matches!(file.of, FileOf::State(_));
        if !self.repairs() || !self.dir.is_dir() || !list_files(&self.dir)?.iter().any(is_state) {
            return Ok(());
        }
        // Each process writes its state before its snapshots: with a snapshot, files of a state are missing.
        if !snapshot::list(&self.dir)?.is_empty() {
            return Err(self.clone().no_state());
        }
        let _lock = self.lock()?;
        snapshot::remove_leftovers(&self.dir)
    }
}

/// Settings, tensors and averages of a resume.
struct Prepared {
    settings: Settings,
    registry: TensorRegistry,
    /// Number of each tensor's CUDA device; none for the host.
    places: Vec<Option<usize>>,
    non_finite: NonFinitePolicy,
    values: StateValues,
    extensions: Vec<Extension>,
}

/// Settings and tensors of a resume, with the engine that holds the averages.
struct Started {
    settings: Settings,
    registry: TensorRegistry,
    non_finite: NonFinitePolicy,
    extensions: Vec<Extension>,
    engine: Box<dyn Engine>,
}
