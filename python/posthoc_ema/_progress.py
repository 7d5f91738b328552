"""Progress of what takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int | None], object] | bool | None
"""A function of the bytes read so far and in all (None where that is not known), or whether to draw a bar.

None draws a bar where the standard error is a terminal."""


@contextmanager
def following(
    progress: Progress, total: Callable[[], int | None], what: str
) -> Iterator[Callable[[int], object] | None]:
    """What the native part calls with the bytes read so far; `total` is asked only where somebody wants to know."""
    if callable(progress):
        told, whole = progress, total()
        yield lambda done: told(done, whole)
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    # No bar for what is done within a second.
    delay = 0 if progress else 1
    with tqdm(total=total(), desc=what, unit="B", unit_scale=True, unit_divisor=1024, delay=delay, leave=False) as bar:
        yield lambda done: bar.update(done - bar.n)
