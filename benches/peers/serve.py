"""The other end of :class:`turns.Worker`: a process that works when it is told."""

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
    """Answers each line on stdin by the command that it names, until stdin ends.

    A command returns what is to be answered, a dictionary or nothing; one that raises answers with the error, so that
    its row says why.
    """
    # Imports are done when this is answered.
    commands = {"ready": dict, **commands}
    # Whatever a library prints must not be taken for an answer.
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
    """A package from the folder that is first on the path, and no other: the import name of one is ours, too."""
    module = importlib.import_module(name)
    if not Path(str(module.__file__)).is_relative_to(Path(sys.path[0]).resolve()):
        raise ImportError(f"{sys.path[0]} holds no {name}")
    return module


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
