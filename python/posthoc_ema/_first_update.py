"""Knowledge of all ranks if there was a first update, which rank 0 leaves out if the parameters have NaN."""

from __future__ import annotations

import warnings

from ._lifetime import StepCounter
from ._ranks import Notices


class FirstUpdate:
    """Notices of rank 0 after each due update until one was done. Rank 0 waits for no other, as for all notices.

    Args:
        notices: Notices of the run.
        counter: Counter of the steps of this rank, before the first update.
    """

    def __init__(self, notices: Notices, counter: StepCounter):
        self._notices = notices
        self._counter = counter
        self._read = 0
        self._is_done = False

    def note(self, step: int, last_update: int | None) -> bool:
        """Leaves a notice of rank 0, if an update was due.

        Args:
            step: Steps counted so far.
            last_update: Step of the newest update that was done.

        Returns:
            True if no further notice follows.
        """
        before = self._counter.updates
        self._counter.count_to(step)
        if self._counter.updates == before:
            return False
        try:
            self._notices.leave_further(self._counter.updates, last_update is not None)
        except RuntimeError as failure:
            warnings.warn(
                f"the other ranks could not be informed of the first update: {failure}", RuntimeWarning, stacklevel=3
            )
        return last_update is not None

    def is_done(self) -> bool:
        """Returns True if rank 0 has done one of the updates that this rank has counted; may wait for rank 0."""
        while not self._is_done and self._read < self._counter.updates:
            self._is_done = bool(self._notices.read_further(self._read + 1, "has_average"))
            self._read += 1
        return self._is_done
