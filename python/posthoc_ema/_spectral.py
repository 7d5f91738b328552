"""Spectral norms of PyTorch, whose singular vectors must fit the weights that a model holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._lend import torch_module

# The search ends when the squared singular value grows by less than this part of it, or after this many rounds.
_TOLERANCE = 1e-6
_ROUNDS = 50
# Directions of one round, among which the best combination is chosen.
_DIRECTIONS = 12


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
    """Sets `u` and `v` to the singular vectors of the largest singular value, which they are close to.

    These are the vectors that the power iteration converges to. It would take a thousand steps where this method, which
    chooses the best combination of all steps (Lanczos), takes tens.
    """
    torch = torch_module()
    assert torch is not None
    matrix = matrix.detach()
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    normalize = torch.nn.functional.normalize
    left = u.to(matrix.dtype)
    left = normalize(left if bool(left.norm() > 0) else torch.ones_like(left), dim=0)
    previous = 0.0
    for _ in range(_ROUNDS):
        left, squared = _best_direction(matrix, left)
        if not squared - previous > _TOLERANCE * squared:
            break
        previous = squared
    right = normalize(matrix.mH @ left, dim=0)
    left = normalize(matrix @ right, dim=0)
    if bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        u.copy_(left)
        v.copy_(right)


def _best_direction(matrix: Any, start: Any) -> tuple[Any, float]:
    """Returns the unit vector that the transposed matrix stretches most, among those reached from a start.

    Returns:
        The vector, and the square of its stretch.
    """
    torch = torch_module()
    assert torch is not None
    basis = start[None]
    images = (matrix.mH @ start)[None]
    for _ in range(min(_DIRECTIONS, len(start)) - 1):
        new = matrix @ images[-1]
        before = new.norm()
        # Twice, since one pass leaves the rounding of what it removes.
        for _ in range(2):
            new = new - (basis.conj() @ new) @ basis
        # Drops the noise that is left if no further direction is reached.
        new = torch.where(new.norm() > 1e-4 * before, torch.nn.functional.normalize(new, dim=0), 0.0)
        basis = torch.cat([basis, new[None]])
        images = torch.cat([images, (matrix.mH @ new)[None]])
    stretch = images.conj() @ images.T
    if not bool(torch.isfinite(stretch).all()):
        return torch.full_like(start, torch.nan), 0.0
    values, vectors = torch.linalg.eigh(stretch)
    best = torch.nn.functional.normalize(vectors[:, -1] @ basis, dim=0)
    return best, float(values[-1])
