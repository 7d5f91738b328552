"""Methods that `torch.compile` does not look into."""

from __future__ import annotations

import inspect
from typing import Any

from ._lend import torch_module

_kept_out: set[Any] = set()


def keep_out_of_graphs(owner: type, names: tuple[str, ...]) -> None:
    """Makes `torch.compile` call methods of a class instead of tracing them; does nothing without PyTorch.

    The wrapper of `torch.compiler.disable` costs more than a step at which nothing is due. So the code itself is
    marked, and wrapped only if this version of PyTorch cannot do that.
    """
    torch = torch_module()
    if torch is None or owner in _kept_out:
        return
    _kept_out.add(owner)
    frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    try:
        skip = frames._FrameAction.SKIP  # type: ignore[union-attr]
        strategy = frames._FrameExecStrategy(skip, skip)  # type: ignore[union-attr]
        mark = frames.set_code_exec_strategy  # type: ignore[union-attr]
    except AttributeError:
        disable = getattr(getattr(torch, "compiler", None), "disable", None)
        if disable is not None:
            for name in names:
                setattr(owner, name, disable(getattr(owner, name)))
        return
    for name in names:
        method: Any = getattr(owner, name)
        # Not within the graph of a caller, and not as a graph of its own.
        method._torchdynamo_disable = True
        mark(inspect.unwrap(method).__code__, strategy)
