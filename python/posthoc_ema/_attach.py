"""Hooks that count the steps of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Wrappers that step the optimizer they hold as `optimizer`, which then calls its hooks: of accelerate and Lightning.
_WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}


class Attachment:
    """Calls a function after each step of an optimizer that changed its parameters, until `remove` is called.

    The optimizer holds the function, and this object holds neither.

    Args:
        optimizer: Optimizer of PyTorch, as it is or in a wrapper of accelerate, Lightning or Fabric.
        after_step: Function to call.

    Raises:
        TypeError: If the optimizer calls no hooks.
    """

    def __init__(self, optimizer: Any, after_step: Callable[[], None]):
        inner = unwrap(optimizer)
        if not getattr(getattr(type(inner), "step", None), "hooked", False):
            raise TypeError(
                f"{type(inner).__name__} calls no hooks after its steps: call `update_` after each of them instead, or "
                f"attach to the optimizer inside if nothing changes the weights after its step"
            )
        self.optimizer_name = type(inner).__name__
        """Name of the optimizer's class."""
        may_nest = sum("step" in base.__dict__ for base in type(inner).__mro__) > 2

        def hook(optimizer: Any, _: Any, kwargs: dict[str, Any]) -> None:
            if not _was_skipped(optimizer, kwargs) and not (may_nest and _is_nested(optimizer)):
                after_step()

        self._handle = inner.register_step_post_hook(hook)

    @property
    def is_active(self) -> bool:
        """True until `remove` is called or the optimizer is gone."""
        return self._handle.id in (self._handle.hooks_dict_ref() or ())

    def remove(self) -> None:
        """Ends the calls; may be called again."""
        self._handle.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def unwrap(optimizer: Any) -> Any:
    """Returns the optimizer inside the wrappers of accelerate, Lightning and Fabric."""
    while {base.__name__ for base in type(optimizer).__mro__} & _WRAPPERS:
        optimizer = optimizer.optimizer
    return optimizer


def check_trains(optimizer: Any, model: Any) -> None:
    """Checks that an optimizer trains parameters of a module.

    Raises:
        ValueError: If it holds none of them.
    """
    trained = {id(parameter) for group in unwrap(optimizer).param_groups for parameter in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"the {type(unwrap(optimizer)).__name__} holds no parameter of the {type(model).__name__}: attach to the "
            f"optimizer that trains this model; if it trains copies of the parameters (DeepSpeed, master weights), "
            f"call `update_` after each step instead"
        )


def _was_skipped(optimizer: Any, kwargs: dict[str, Any]) -> bool:
    """Returns True if a GradScaler found infinite gradients, so that the step changed nothing.

    Most optimizers are not called then. Fused ones are, and look for themselves; on a GPU this look waits for it.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None:
        return float(found) > 0
    scaler = kwargs.get("grad_scaler")
    return scaler is not None and any(float(f) > 0 for f in scaler._found_inf_per_device(optimizer).values())


def _is_nested(optimizer: Any) -> bool:
    """Returns True inside the step of a parent class that a subclass's own step calls: both call the hooks."""
    wrapper = type(optimizer).step.__code__
    frame = sys._getframe()
    calls = 0
    while frame is not None and calls < 2:
        calls += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1
