"""Averages that a sweep writes in a form, for evaluations that take a path."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import _native
from ._form import output_form, patterns
from ._plans import Plan
from ._profiles import Profile

WritePaths = Callable[[list[Profile], list[Path], _native.OutputForm], None]
"""Writes averages to paths, in one pass."""


@dataclass(frozen=True)
class FormOptions:
    """Form of the averages of a sweep; the arguments are those of `PostHocEMA.write`."""

    like: str | os.PathLike[str] | None = None
    shard_size: int | str | None = None
    rename: str | tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    follow_links: bool = False

    @classmethod
    def given(
        cls,
        like: str | os.PathLike[str] | None,
        shard_size: int | str | None,
        rename: str | Iterable[str],
        leave_out: Iterable[str],
        follow_links: bool,
    ) -> FormOptions:
        """Returns the options that a caller gave."""
        rules = rename if isinstance(rename, str) else tuple(rename)
        return cls(like, shard_size, rules, tuple(patterns("leave_out", leave_out)), follow_links)

    def of_second(self, like: str | os.PathLike[str] | None, second: object) -> FormOptions:
        """Returns the form of the second run's averages: the same, or like another folder if one is given.

        Raises:
            ValueError: If such a run is missing.
        """
        if like is not None and second is None:
            raise ValueError(f"with_like = {os.fspath(like)!r}: it goes with `with_run`, the run of that model")
        return self if like is None else replace(self, like=like)

    def read(self) -> _native.OutputForm:
        """Reads the folder, and checks the rules."""
        return output_form(self.like, self.shard_size, self.rename, self.leave_out, self.follow_links)


class WrittenAverage:
    """Average on disk, which is removed with this object."""

    def __init__(self, path: Path):
        self._path = path
        weakref.finalize(self, _remove, path)

    def __call__(self, stack: ExitStack, job: int) -> object:
        return self._path


@dataclass
class AverageWriter:
    """Writes the averages of a batch beside each other."""

    form: _native.OutputForm
    directory: Path | None
    """Directory of the sweep; None for one without, whose averages are in a temporary directory."""
    name: str
    """Name of the folder of averages in it."""
    _temporary: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    def write(self, targets: list[Profile], plans: list[Plan], write: WritePaths) -> list[WrittenAverage]:
        """Writes averages in one pass, each under a name of its own."""
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        extension = self.extension()
        paths: list[Path] = []
        for plan in plans:
            stem = f"{str(plan.profile).replace(' ', '-')}.step-{plan.at}"
            names = (folder / f"{stem}{number}{extension}" for number in ["", *(f"-{i}" for i in range(2, 1 << 16))])
            paths.append(next(path for path in names if path not in paths and not path.exists()))
        averages = [WrittenAverage(path) for path in paths]
        write(targets, paths, self.form)
        return averages

    def replace(self, path: Path, target: Profile, write: WritePaths) -> None:
        """Writes an average in the place of an earlier one."""
        if not self.form.is_folder():
            write([target], [path], self.form)
            return
        new = self._folder() / path.name
        _remove(new)
        write([target], [new], self.form)
        # The name of a folder that is not empty cannot be taken over.
        _remove(path)
        new.rename(path)

    def extension(self) -> str:
        """Returns the extension of averages."""
        return "" if self.form.is_folder() else ".safetensors"

    def close(self) -> None:
        """Removes the temporary directory."""
        while self._temporary:
            self._temporary.pop().cleanup()

    def _folder(self) -> Path:
        if self.directory is not None:
            return self.directory / self.name
        if not self._temporary:
            self._temporary.append(tempfile.TemporaryDirectory(prefix="posthoc-ema-sweep-"))
        return Path(self._temporary[0].name)


def _remove(path: Path) -> None:
    """Removes an average, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
