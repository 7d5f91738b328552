"""Progress of work that may take longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int | None], object] | bool | None
"""Progress of reading: a function of the bytes read so far and in total, True for a bar, or False for none.

The total is None if it is not known. The default None draws a bar if standard error is a terminal."""


def wants_bar(progress: bool | None) -> bool:
    """Returns True if a bar is to be drawn."""
    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def byte_progress(
    progress: Progress, total: Callable[[], int | None], description: str, unit: str = "B"
) -> Iterator[Callable[[int], object] | None]:
    """Yields the function that the native part calls with the bytes read, or other units done, so far, or None.

    Args:
        progress: Choice of the caller.
        total: Returns the number of all units, if known; called only if the progress is shown.
        description: Label of the bar.
        unit: Name of the unit. Bytes have prefixes.
    """
    if callable(progress):
        report = progress
        whole = total()
        yield lambda done: report(done, whole)
    elif wants_bar(progress):
        from tqdm import tqdm

        # A bar that was not asked for appears after a second.
        delay = 0 if progress else 1
        scale = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
        with tqdm(total=total(), desc=description, unit=unit, delay=delay, leave=False, **scale) as bar:
            yield lambda done: bar.update(done - bar.n)
    else:
        yield None
