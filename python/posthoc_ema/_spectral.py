"""Spectral norms of PyTorch, whose singular vectors must fit the weights that a model holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._lend import torch_module

# The power iteration ends when the singular value grows by less than this part of it, or after this many rounds.
_TOLERANCE = 1e-7
_ROUNDS = 1000
# Rounds between two looks at the singular value, each of which waits for the device.
_BETWEEN_LOOKS = 5


def refresh_spectral_norms(model: Any) -> int:
    """Computes the singular vectors of a module's spectral norms again, for the weights that it holds.

    Of `torch.nn.utils.spectral_norm` and `torch.nn.utils.parametrizations.spectral_norm`, a file of an average has the
    vectors of the newest update, which do not fit the averaged weights. To be called after such a file was loaded.
    `PostHocEMA.model` does it by itself.

    Args:
        model: Module of PyTorch; its buffers are changed in place.

    Returns:
        Number of spectral norms.
    """
    torch = torch_module()
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"{type(model).__name__} is not a module of PyTorch")
    count = 0
    with torch.no_grad():
        for matrix, u, v in _spectral_norms(model):
            _iterate(matrix, u, v)
            count += 1
        recompute_weights(model)
    return count


def recompute_weights(model: Any) -> None:
    """Computes the weights that hooks of `torch.nn.utils` derive: old weight and spectral norms, and pruning."""
    torch = torch_module()
    assert torch is not None
    with torch.no_grad():
        for part in model.modules():
            for hook in part._forward_pre_hooks.values():
                if _is_of(hook, "torch.nn.utils.spectral_norm", "SpectralNorm"):
                    setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))
                elif any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__):
                    hook(part, None)


def _spectral_norms(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yields matrix, left and right singular vector of each spectral norm."""
    for part in model.modules():
        for hook in part._forward_pre_hooks.values():
            if _is_of(hook, "torch.nn.utils.spectral_norm", "SpectralNorm"):
                matrix = hook.reshape_weight_to_matrix(getattr(part, f"{hook.name}_orig"))
                yield matrix, getattr(part, f"{hook.name}_u"), getattr(part, f"{hook.name}_v")
        if "parametrizations" in part._modules:
            for chain in part._modules["parametrizations"].values():
                yield from _in_chain(chain)


def _in_chain(chain: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the spectral norms of a chain of parametrizations, each applied to the result of those before it."""
    steps = list(chain)
    if not any(_is_of(step, "torch.nn.utils.parametrizations", "_SpectralNorm") for step in steps):
        return
    single = getattr(chain, "is_tensor", True)
    values = [chain.original] if single else [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
    for step in steps:
        # A vector is divided by its length, without singular vectors.
        if _is_of(step, "torch.nn.utils.parametrizations", "_SpectralNorm") and hasattr(step, "_u"):
            yield step._reshape_weight_to_matrix(values[0]), step._u, step._v
        training = step.training
        step.training = False
        try:
            values = [step(*values)]
        finally:
            step.training = training


def _is_of(found: Any, module: str, name: str) -> bool:
    return any(base.__name__ == name and base.__module__ == module for base in type(found).__mro__)


def _iterate(matrix: Any, u: Any, v: Any) -> None:
    """Runs the power iteration from the present vectors until the singular value stays as it is."""
    torch = torch_module()
    assert torch is not None
    matrix = matrix.detach()
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    left = u.to(matrix.dtype)
    if not bool(left.norm() > 0):
        left = torch.ones_like(left)
    normalize = torch.nn.functional.normalize
    right, previous = v.to(matrix.dtype), 0.0
    for done in range(1, _ROUNDS + 1):
        right = normalize(matrix.mH @ left, dim=0, eps=1e-12)
        product = matrix @ right
        left = normalize(product, dim=0, eps=1e-12)
        if done % _BETWEEN_LOOKS == 0:
            largest = float(product.norm())
            if not largest - previous > _TOLERANCE * _BETWEEN_LOOKS * largest:
                break
            previous = largest
    if bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        u.copy_(left)
        v.copy_(right)
