"""Warnings of averages that are far from what was asked for."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from . import _native

# Files between a caller and the code here.
_INTERNAL = (str(Path(__file__).parent), contextlib.__file__)

_silenced: ContextVar[bool] = ContextVar("_silenced", default=False)


def warn() -> None:
    """Raises the warnings of the averages that were made since the last call, at the line of the caller's own code.

    Each target of a run is warned of once in a process. The native part decides, and words reason and remedy.
    """
    texts = _native.take_warnings()
    for text in [] if _silenced.get() else texts:
        warnings.warn(text, RuntimeWarning, stacklevel=external_stacklevel())


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Leaves out all warnings of a block, whose targets were warned of before."""
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)


def external_stacklevel() -> int:
    """Returns the level of the first caller outside of the package, for a warning of the calling function."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
        level += 1
    return level
