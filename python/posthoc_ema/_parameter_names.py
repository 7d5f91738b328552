"""Names in a run for parameters that come without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def names_in(module: Any, parameters: Sequence[Any]) -> list[list[str]]:
    """Returns all names of each parameter in a module.

    Raises:
        ValueError: If a parameter is not in the module.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for i, parameter in enumerate(parameters):
        if id(parameter) not in names:
            raise ValueError(
                f"parameter {i}, of shape {tuple(parameter.shape)}, is not one of model={type(module).__name__}: pass "
                f"the module that has all parameters"
            )
    return [names[id(parameter)] for parameter in parameters]


def numbers(count: int) -> list[list[str]]:
    """Returns a number as the name of each parameter."""
    width = max(4, len(str(count - 1)))
    return [[f"{i:0{width}}"] for i in range(count)]
