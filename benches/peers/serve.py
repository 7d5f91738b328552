"""Process behind a :class:`turns.Worker`: it runs a command for each request."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """Runs the command that each line on stdin names, and prints its answer, until stdin ends.

    A command returns its answer, a dictionary or nothing. If it raises, the answer is the error, which its row shows.
    """
    # An answer to "ready" shows that all imports are done.
    commands = {"ready": dict, **commands}
    # Output of a library must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = commands[request.pop("do")](**request) or {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).strip() or '?'}".splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


def import_peer(name: str) -> Any:
    """Imports a package from the first folder on the path only: one peer has our import name."""
    module = importlib.import_module(name)
    if not Path(str(module.__file__)).is_relative_to(Path(sys.path[0]).resolve()):
        raise ImportError(f"{sys.path[0]} holds no {name}")
    return module


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that `work` takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
