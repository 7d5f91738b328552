"""Methods that synthesize averages of any length from a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._batch_norm import update_bn
from ._form import output_form
from ._launch import launched
from ._model import Model
from ._options import check_calculation_dtype
from ._plans import Noise, Plan
from ._profiles import Profile, Target, as_profile
from ._progress import Progress
from ._run_reader import RunReader
from ._save_pretrained import saver
from ._sweep import JointOptions, SweepProgress, sweep
from ._trials import Swept
from ._written_averages import FormOptions


class RunAverages:
    """Averages of a run that is tracked or was opened by path; the base of `PostHocEMA`."""

    checkpoint_dir: Path
    """Directory of the run."""
    profiles: list[Profile]
    """Tracked profiles."""
    _reader: RunReader

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """Relative standard deviations of the tracked power functions; exponentials have none."""
        return tuple(s for s in (profile.as_sigma_rel for profile in self.profiles) if s is not None)

    @property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the tracked power functions."""
        described = (profile.to_dict() for profile in self.profiles)
        return tuple(description["gamma"] for description in described if description["kind"] == "power")

    @property
    def local(self) -> RunAverages:
        """The same averages, computed by this process alone.

        Under `rank_zero_only`, `model`, `state_dict` and `synthesize` are calls of all ranks. A block that only rank 0
        runs uses this instead: `if rank == 0: with ema.local.model(model, 0.15): ...`.

        Raises:
            RuntimeError: If this process does not track.
        """
        reader = self._reader.alone
        if reader is self._reader:
            return self
        alone = RunAverages()
        alone.checkpoint_dir, alone.profiles, alone._reader = self.checkpoint_dir, self.profiles, reader
        return alone

    @contextmanager
    def model(
        self,
        model: Model,
        sigma_rel: Target,
        step: int | None = None,
        calculation_dtype: Any = None,
        *,
        noise: Noise = "off",
    ) -> Iterator[Model]:
        """Puts an average into the model, in place and in eval mode, for a `with` block.

        After the block, also if it raises, every tensor of the run has its own bits, address and device again, every
        submodule its training flag, and every parameter its gradient. During the block, host memory holds one copy of
        the original tensors. Only strided tensors take memory of a GPU, while they are written. Blocks may be nested. A
        backward pass after the block through results of the block raises an error. Gradients are taken away for the
        block, so that a backward pass in it adds to none. Of tensors that the run lacks, buffers are restored too.
        The singular vectors of PyTorch's spectral norms are computed again for the averaged weights. Another thread may
        not begin a block of the same model meanwhile.

        Under `rank_zero_only` all ranks call it with equal arguments. Each gets rank 0's average, bit for bit, and
        leaves the block by itself. Of a sharded model each rank gets the average of its own shards.

        Args:
            model: Tracked model, or another of its structure.
            sigma_rel: Length of the average, or any profile.
            step: Step of the average; default the newest update during training, the newest snapshot of a run opened by
                path.
            calculation_dtype: Accepted for compatibility, without effect.
            noise: Regularisation against the rounding of stored snapshots, which short averages and those of other
                tools amplify: "off", "auto" (smallest predicted error) or a number. Only for stored snapshots: of a run
                opened by path, or of an earlier `step`.

        Yields:
            The model with the average in it.

        Raises:
            ValueError: If the model has another structure, the target is not valid, or the step is outside the run.
            RuntimeError: If there was no update yet, or another thread evaluates an average in this model. At the end,
                if something could not be restored, such as a changed parameter that the run lacks. It is named.
            TimeoutError: Under `rank_zero_only`, if a rank did not call it until the time-out of the process group.
        """
        check_calculation_dtype(calculation_dtype)
        with self._reader.swapped(model, sigma_rel, step, noise):
            yield model

    def save_pretrained(
        self,
        model: Model,
        directory: str | os.PathLike[str],
        sigma_rel: Target,
        step: int | None = None,
        *,
        noise: Noise = "off",
        **options: Any,
    ) -> None:
        """Writes the folder that the model's own library writes, with an average in the place of the weights.

        The library loads it as any other: `from_pretrained(directory)`. With several processes rank 0 writes.

        Args:
            model: Model of transformers, diffusers, PEFT or timm, or another with a method `save_pretrained`, in its
                wrappers or without. It has its own weights again afterwards, as after a block of `model`.
            directory: Folder to write.
            sigma_rel: Length of the average, or any profile.
            step: Step of the average, as for `model`.
            noise: Regularisation, as for `model`.
            **options: Further arguments of the library's `save_pretrained` (timm's `save_for_hf`).

        Raises:
            TypeError: If no library is known to save the model.
            ValueError: As for `model`; if the model is sharded, of which no rank has the whole average.
            RuntimeError: As for `model`.
        """
        self._reader.check_whole("save_pretrained")
        save = saver(model)
        with self.model(model, sigma_rel, step, noise=noise):
            if launched().rank == 0:
                save(directory, **options)

    @contextmanager
    def state_dict(
        self,
        sigma_rel: Target,
        step: int | None = None,
        calculation_dtype: Any = None,
        *,
        noise: Noise = "off",
    ) -> Iterator[dict[str, Any]]:
        """Synthesizes an average as a state dict for `load_state_dict`.

        Under `rank_zero_only` and of a sharded model it is a call of all ranks.

        Args:
            sigma_rel: Length of the average, or any profile.
            step: Step of the average, as for `model`.
            calculation_dtype: Accepted for compatibility, without effect.
            noise: Regularisation, as for `model`.

        Yields:
            New tensors in host memory, in the model's dtypes and under the keys of its state dict, which may be kept
                after the block. Without a model (a run opened by path) the keys are those without wrappers. With
                `only_save_diff`, load them with `strict=False`.

        Raises:
            ValueError: If the target is not valid, or the step is outside the run.
            RuntimeError: If there was no update yet.
        """
        check_calculation_dtype(calculation_dtype)
        yield self.synthesize([sigma_rel], step, noise=noise)[0]

    def synthesize(
        self,
        targets: Iterable[Target],
        step: int | None = None,
        *,
        dtype: Any = None,
        noise: Noise = "off",
        progress: Progress = None,
    ) -> list[dict[str, Any]]:
        """Synthesizes averages of several lengths in one pass over the snapshots.

        Under `rank_zero_only` all ranks call it with equal arguments, and get the same bits. Of a sharded model
        each rank gets DTensors of its own shards.

        Args:
            targets: Profiles, or numbers as sigma_rel.
            step: Step of the averages, as for `model`.
            dtype: Dtype of averaged tensors; default each tensor's own in the model.
            noise: Regularisation, as for `model`.
            progress: Function of the bytes read so far and in total, True for a bar, or False for none; default a bar
                on a terminal.

        Returns:
            A state dict of new tensors in host memory for each target, in their order. Tied names share a tensor.

        Raises:
            ValueError: If a target is not valid, or the step is outside the run.
            RuntimeError: If there was no update yet.
        """
        return self._reader.synthesize(targets, step, dtype, noise, progress)

    def write(
        self,
        targets: Iterable[Target],
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        dtype: Any = None,
        device: str = "auto",
        noise: Noise = "off",
        like: str | os.PathLike[str] | None = None,
        shard_size: int | str | None = None,
        rename: str | Iterable[str] = (),
        leave_out: Iterable[str] = (),
        follow_links: bool = False,
        part: tuple[int, int] | None = None,
        progress: Progress = None,
    ) -> list[Path]:
        """Writes averages of several lengths as safetensors files or folders, in one pass over the stored snapshots.

        Memory stays bounded for models of any size.

        Args:
            targets: Profiles, or numbers as sigma_rel.
            directory: Folder of the outputs, which are named after target and step; created if it is missing.
            step: Step of the averages; default that of the newest snapshot.
            dtype: Dtype of averaged tensors; default each tensor's own, or that of `like`.
            device: Device of the blend: "auto", "cpu" or "cuda:N". The bits are the same on all.
            noise: Regularisation, as for `model`.
            like: Folder of a model as `save_pretrained` writes it. Each average becomes such a folder, which the
                model's library loads: with its names of tensors, tied tensors, dtypes and shards, and all of its files
                but weights and the state of a training.
            shard_size: Largest size of a shard in bytes, or a text such as "5GB". Each average becomes a folder, with
                an index if it has more than one shard.
            rename: Rules that rename tensors: `s/PATTERN/REPLACEMENT/` as of `sed -E`, "wrappers" (takes away
                `module.`, `_orig_mod.` and the like) or "peft" (takes away an adapter's `.default`). If the names do
                not fit `like`, the last two are tried.
            leave_out: Names or globs of tensors to leave out.
            follow_links: Copy files of `like` even if they are links that lead out of its folder.
            part: Part (K, N) of the averages, counted from 1: N processes write them together, as the program's
                `--part` does. They appear when the last part is written.
            progress: As for `synthesize`.

        Returns:
            The files or folders, in the order of the targets.

        Warns:
            UserWarning: If tensors are renamed or left out without being asked for, to fit `like`.

        Raises:
            ValueError: If a target is not valid, the step is outside the run, `directory` is the run's own, or an
                average would not load strictly in the place of the weights of `like`.
            OSError: If a file cannot be read or written.
        """
        form = output_form(like, shard_size, rename, leave_out, follow_links)
        return self._reader.write(targets, directory, step, dtype, device, noise, form, part, progress)

    def plan(self, targets: Iterable[Target], step: int | None = None, *, noise: Noise = "off") -> list[Plan]:
        """Solves the weights of targets and predicts their errors; of stored tensors only a sample is read.

        Args:
            targets: Profiles, or numbers as sigma_rel.
            step: Step of the averages, as for `model`.
            noise: Regularisation, as for `model`.

        Returns:
            A plan for each target, in their order.

        Raises:
            ValueError: If a target is not valid, or the step is outside the run.
            RuntimeError: If there was no update yet.
        """
        return self._reader.plan(targets, step, noise)

    def sweep(
        self,
        evaluate: Callable[[Any], object],
        targets: Iterable[Target] = (),
        *,
        sigma_rels: Iterable[float] = (),
        model: Model = None,
        minimize: bool = True,
        metrics: Mapping[str, str] | None = None,
        repeats: int = 1,
        refine: int = 6,
        step: int | None = None,
        noise: Noise = "off",
        out: str | os.PathLike[str] | None = None,
        name: str | None = None,
        batch: int = 8,
        progress: SweepProgress = None,
        jobs: int = 1,
        groups: Iterable[str] = (),
        with_run: RunAverages | None = None,
        with_model: Model = None,
        rounds: int = 2,
        like: str | os.PathLike[str] | None = None,
        with_like: str | os.PathLike[str] | None = None,
        shard_size: int | str | None = None,
        rename: str | Iterable[str] = (),
        leave_out: Iterable[str] = (),
        follow_links: bool = False,
    ) -> Swept:
        """Evaluates averages of many lengths, refines around the best one, and returns it.

        All targets are evaluated first, then `refine` golden-section steps between the neighbours of the best, within
        its family of profiles. If the best is at an edge of the list, the steps go outwards first, as far as the run
        makes averages with a relative error of at most 5%. A flat curve is not refined.

        An evaluation that raises, or returns no finite number, is recorded, and the sweep continues. Ctrl-C ends the
        sweep. With `out`, the same call continues it later and repeats the evaluations that failed.

        Args:
            evaluate: Returns the score of an average. It takes a state dict of new tensors; with `model`, that model
                with the average in it, in eval mode, as in a block of `PostHocEMA.model`. With `like`, `shard_size`,
                `rename` or `leave_out`, and without `model`, it takes the path of a file or folder, which is removed
                after the evaluation.
            targets: Profiles, or numbers as sigma_rel.
            sigma_rels: Further targets.
            model: Tracked model, or another of its structure. It has its own bits again after each evaluation.
            minimize: True if small scores are better, False if large ones are; with `metrics`, their directions count.
            metrics: Names of several metrics, each with "min" or "max": `{"fid": "min", "acc": "max"}`. The evaluation
                then returns a dictionary with a number for each. Each metric has its own best and its own refinement.
            repeats: Evaluations of each average, for a standard error. A parameter of the evaluation with the name
                `repeat` gets their number, from 1: random numbers should be seeded by it.
            refine: Number of refinement steps.
            step: Step of the averages, as for `model`.
            noise: Regularisation, as for `model`.
            out: Directory for the scores, `sweep.json`, and the best average, `best.safetensors`. It is created if it
                is missing, and must be outside the run's directory.
            name: Name under which `out` records the evaluation; default the function's own. A lambda, a function within
                another one, a method, a partial or an object has no unique name, and needs this option to continue.
            batch: Number of state dicts that are synthesized in one pass and held in memory. With `model`, each average
                is blended into the model in a pass of its own.
            progress: Function of the evaluations done and planned, True for a bar, or False for none; default a bar on
                a terminal.
            jobs: Evaluations at a time, each on a thread of its own; also refinements. With `model`, that is a list of
                models then, one for each job. A parameter of the evaluation with the name `job` gets the number of the
                job, from 0. PyTorch's operations, files and subprocesses of threads run side by side, Python code in
                turns. A thread begins with PyTorch's defaults: `torch.no_grad` belongs into the evaluation.
            groups: Globs of tensor names: each group has a length of its own, and so have the other tensors. All begin
                with the same one; then one is varied at a time. Of stored snapshots only.
            with_run: Second run, such as that of a guiding model. The evaluation takes an average of it as its second
                argument, at the newest step of that run, whose length is varied in turns with the others.
            with_model: As `model`, for the averages of the second run.
            rounds: Turns in which each length of a joint sweep is varied at most, for each metric.
            like: Folder of a model that averages are written like, as for `PostHocEMA.write`: the evaluation loads a
                folder by `from_pretrained`. The best is the folder `best` in `out`.
            with_like: As `like`, for the averages of the second run; default that of `like`.
            shard_size: Largest size of a shard, as for `PostHocEMA.write`.
            rename: Rules that rename tensors, as for `PostHocEMA.write`.
            leave_out: Names or globs of tensors to leave out.
            follow_links: Copy files of `like` even if they are links that lead out of its folder.

        Returns:
            The best average and all trials.

        Raises:
            ValueError: If no target is given, one is not valid, the step is outside the run, or `out` holds another
                sweep or one that may be of another evaluation. Also if an average would not load strictly in the place
                of the weights of `like`, or is of the newest update and a form is given.
            RuntimeError: If all evaluations failed, caused by the exception of the first.
            OSError: If the directory cannot be written.
        """
        profiles = [*map(as_profile, targets), *map(Profile.sigma_rel, sigma_rels)]
        self._reader.check_whole("sweep")
        alone = self.local
        second = None if with_run is None else (with_run.local, with_run.local._reader)
        if (with_model is not None) != (model is not None and with_run is not None):
            raise ValueError("with_model goes with `model` and `with_run`: give all three, or evaluate state dicts")
        form = FormOptions.given(like, shard_size, rename, leave_out, follow_links)
        with ExitStack() as stack:
            stack.enter_context(alone._reader.opened(step))
            if second is not None:
                stack.enter_context(second[1].opened(None))
            return sweep(
                alone,
                alone._reader,
                evaluate,
                profiles,
                model=model,
                minimize=minimize,
                metrics=metrics,
                repeats=repeats,
                refine=refine,
                step=step,
                noise=noise,
                out=out,
                name=name,
                batch=batch,
                progress=progress,
                jobs=jobs,
                joint=JointOptions(tuple(groups), second, with_model, rounds, form.of_second(with_like, second)),
                form=form,
            )

    @staticmethod
    def update_bn(loader: Iterable[Any], model: Any, device: Any = None) -> None:
        """Computes the statistics of batch normalisation again, for a model that holds an average.

        The averages of the statistics, which the run has, are those of other weights. After this call `running_mean`
        and `running_var` are the plain means over the batches, as by `torch.optim.swa_utils.update_bn`. All layers but
        those of batch and instance normalisation stay in eval mode, so that dropout is off and no other buffer changes.
        A model without such layers is not run. Within a block of `PostHocEMA.model`, the statistics last until its end.

            with ema.model(model, sigma_rel=0.15) as averaged:
                ema.update_bn(loader, averaged)
                evaluate(averaged)

        Args:
            loader: Batches: tensors; lists or tuples, of which the first element is the model's input; or dictionaries,
                which are passed by keyword.
            model: Module that holds an average.
            device: Device to which tensors of a batch are moved; default none.

        Raises:
            ValueError: If the loader gives no batch. As after any error, the statistics are as before.
        """
        update_bn(loader, model, device)

    def verify(self) -> None:
        """Reads every byte of every snapshot and compares its checksum.

        Raises:
            ValueError: If a file does not match; the message names the first one.
        """
        self._reader.run().verify()

    # A copy would be a second writer of the run, and a pickled tracker one without a run.

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"{self!r} can be neither copied nor pickled: store its state beside the model's with `ema.save(path)`, "
            f"keep it outside of modules that are copied, and read the run elsewhere with `PostHocEMA.from_path`"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "load_state_dict":
                raise TypeError(
                    "a PostHocEMA is not stored by a state dict: call `ema.save(path)` whenever the trainer stores a "
                    "checkpoint, and continue with `PostHocEMA.from_model(..., resume=True)`"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
