"""Fresh statistics of batch normalisation for a model that holds an average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ._lend import is_torch, torch_module


def update_bn(loader: Iterable[Any], model: Any, device: Any = None) -> None:
    """Computes the statistics of batch normalisation again; see `PostHocEMA.update_bn`."""
    torch = torch_module()
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"{type(model).__name__} is not a module of PyTorch")
    kind = torch.nn.modules.batchnorm._NormBase
    norms = [part for part in model.modules() if isinstance(part, kind) and part.running_mean is not None]
    if not norms:
        return
    modes = [(part, part.training) for part in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [{name: tensor.clone() for name, tensor in norm._buffers.items()} for norm in norms]
    batches = 0
    try:
        with torch.no_grad():
            # Only these layers: dropout stays off, and other layers keep their state, as in the evaluation to come.
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for batch in loader:
                batches += 1
                for norm in norms:
                    # Instance normalisation does not know the cumulative average.
                    is_batch_norm = isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)
                    norm.momentum = None if is_batch_norm else 1.0 / batches
                _run(model, batch, device)
        if batches == 0:
            raise ValueError("the loader gave no batch to compute statistics of: note that a generator works once only")
    except BaseException:
        for norm, own in zip(norms, statistics):
            for name, tensor in own.items():
                norm._buffers[name].copy_(tensor)
        raise
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for part, training in modes:
            part.training = training


def _run(model: Any, batch: Any, device: Any) -> None:
    """Calls a model with a batch: the values of a dictionary by name, of a sequence the first."""
    if isinstance(batch, Mapping):
        model(**{name: _on(device, value) for name, value in batch.items()})
    else:
        model(_on(device, batch[0] if isinstance(batch, (list, tuple)) else batch))


def _on(device: Any, value: Any) -> Any:
    """Moves a tensor to a device, and the tensors in lists, tuples and dictionaries."""
    if device is None:
        return value
    if is_torch(value):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _on(device, one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on(device, one) for one in value]
    return value
