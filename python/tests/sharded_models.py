"""A small model in every layout that shards it, for processes of a group."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp import fully_shard as shard_module
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Block(torch.nn.Module):
    """Two layers for column and row shards, of a size that no number of processes divides."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = torch.nn.Linear(width, inner)
        self.down = torch.nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class ShardedNet(torch.nn.Module):
    """Tied and frozen weights, one of a single element, and buffers.

    Args:
        inner: Size that tensor parallelism cuts.
    """

    def __init__(self, inner: int = 12):
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(11, 7)
        self.block = Block(7, inner)
        self.norm = torch.nn.LayerNorm(7)
        self.statistics = torch.nn.BatchNorm1d(7)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.frozen = torch.nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.block(x)) * self.gain
        return self.head(self.statistics(x.mean(1))) + self.frozen.sum()


Model = Any
Layout = Callable[[int], Model]
"""Builds the model on a process; the argument is the number of processes."""


def fsdp2(size: int, **options: Any) -> Model:
    """FSDP2 with a group of its own for the block."""
    net = ShardedNet()
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (size,))
    shard_module(net.block, mesh=mesh, **options)
    return shard_module(net, mesh=mesh, **options)


def fsdp2_kept(size: int) -> Model:
    """FSDP2 whose parameters stay together after a forward pass."""
    return fsdp2(size, reshard_after_forward=False)


def fsdp2_mixed(size: int) -> Model:
    """FSDP2 in bfloat16, whose shards are float32."""
    net = ShardedNet()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (size,))
    shard_module(net.block, mesh=mesh, mp_policy=policy)
    return shard_module(net, mesh=mesh)


def fsdp2_offloaded(size: int) -> Model:
    """FSDP2 with its policy for shards on the CPU."""
    return fsdp2(size, offload_policy=CPUOffloadPolicy(pin_memory=False))


def fsdp2_ignoring(size: int) -> Model:
    """FSDP2 of the block alone: all other parameters are plain tensors on every process."""
    net = ShardedNet()
    shard_module(net.block, mesh=init_device_mesh("cpu", (size,)))
    return net


def fsdp2_columns(size: int) -> Model:
    """FSDP2 that cuts a second dimension."""
    net = ShardedNet()

    def placement(parameter: torch.nn.Parameter) -> Shard:
        last = parameter.ndim - 1
        return Shard(last if parameter.shape[last] % size == 0 else 0)

    return shard_module(net, mesh=init_device_mesh("cpu", (size,)), shard_placement_fn=placement)


def hsdp(size: int) -> Model:
    """FSDP2 on two replicas."""
    return fsdp2(size, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards")))


def tensor_parallel(size: int) -> Model:
    """Column and row shards; all else is plain on every process."""
    net = ShardedNet()
    _cut_block(net, init_device_mesh("cpu", (size,)))
    return net


def uneven_tensor_parallel(size: int) -> Model:
    """Column and row shards of different sizes, which PyTorch cannot run."""
    net = ShardedNet(inner=13)
    _cut_block(net, init_device_mesh("cpu", (size,)))
    return net


def _cut_block(net: ShardedNet, mesh: Any) -> None:
    parallelize_module(net.block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_over_tp(size: int) -> Model:
    """FSDP2 of what tensor parallelism has cut, which makes strided shards."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    net = ShardedNet()
    _cut_block(net, mesh["tensor"])
    shard_module(net.block, mesh=mesh["data"])
    return shard_module(net, mesh=mesh["data"])


def hsdp_over_tp(size: int) -> Model:
    """Replicas of FSDP2 of what tensor parallelism has cut."""
    mesh = init_device_mesh("cpu", (2, size // 4, 2), mesh_dim_names=("replicas", "shards", "tensor"))
    net = ShardedNet()
    _cut_block(net, mesh["tensor"])
    return shard_module(net, mesh=mesh["replicas", "shards"])


def data_over_tp(size: int) -> Model:
    """Tensor parallelism whose mesh does not know the replicas."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    net = ShardedNet()
    _cut_block(net, mesh["tensor"])
    return net


class Experts(torch.nn.Module):
    """Weights of several experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gate = torch.nn.Parameter(torch.randn(5, 7))
        self.weight = torch.nn.Parameter(torch.randn(5, 3, 7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # Without the exchange of tokens: each process uses its own experts.
        own = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return torch.stack([self.gate.sum(), own.square().sum() * 1e-3]) + tokens.sum() * 0


def expert_parallel(size: int) -> Model:
    """Experts along the first dimension, of which some processes have none."""
    net = Experts()
    shards = distribute_tensor(net.weight.detach(), init_device_mesh("cpu", (size,)), [Shard(0)])
    net.weight = torch.nn.Parameter(shards)
    return net


def replicated(size: int) -> Model:
    """DTensors that every process holds whole."""
    mesh = init_device_mesh("cpu", (size,))
    net = ShardedNet()
    for module in (net.block.up, net.block.down):
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
    return net


def _without_frozen(net: ShardedNet) -> ShardedNet:
    """Makes a buffer of the frozen weight, since a flat parameter is frozen as a whole or not at all."""
    values = net.frozen.detach()
    del net.frozen
    net.register_buffer("frozen", values)
    return net


def _fsdp1(size: int, original: bool, strategy: ShardingStrategy, **options: Any) -> Model:
    net = _without_frozen(ShardedNet())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options |= {"use_orig_params": original, "sharding_strategy": strategy, "device_id": torch.device("cpu")}
        net.block = FullyShardedDataParallel(net.block, **options)
        return FullyShardedDataParallel(net, **options)


def fsdp1(size: int) -> Model:
    """FSDP1 whose module holds a flat parameter."""
    return _fsdp1(size, False, ShardingStrategy.FULL_SHARD)


def fsdp1_original(size: int) -> Model:
    """FSDP1 whose module holds its own parameters."""
    return _fsdp1(size, True, ShardingStrategy.FULL_SHARD)


def fsdp1_gradients(size: int) -> Model:
    """FSDP1 that keeps the parameters together between forward and backward."""
    return _fsdp1(size, True, ShardingStrategy.SHARD_GRAD_OP)


def fsdp1_hybrid(size: int) -> Model:
    """FSDP1 on two replicas."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    return _fsdp1(size, True, ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def zero3(size: int) -> Model:
    """Double of DeepSpeed's ZeRO-3, which does not run here: a plain module with the fields that it documents."""
    net = ShardedNet()
    for parameter in net.parameters():
        whole = parameter.data.reshape(-1)
        count = -(-len(whole) // size)
        padded = torch.cat([whole, torch.full((count * size - len(whole),), torch.nan)])
        parameter.ds_id = id(parameter)
        parameter.ds_shape, parameter.ds_numel = parameter.shape, len(whole)
        parameter.ds_process_group = None
        parameter.ds_tensor = padded[dist.get_rank() * count :][:count].clone()
        parameter.data = torch.empty(0)
    return net


LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    layout.__name__: (layout, sizes)
    for layout, sizes in [
        (fsdp2, (2, 3, 4, 8)),
        (fsdp2_kept, (2,)),
        (fsdp2_mixed, (3,)),
        (fsdp2_offloaded, (3,)),
        (fsdp2_ignoring, (3,)),
        (fsdp2_columns, (3,)),
        (hsdp, (4,)),
        (tensor_parallel, (2, 3)),
        (uneven_tensor_parallel, (3,)),
        (fsdp_over_tp, (4,)),
        (hsdp_over_tp, (8,)),
        (data_over_tp, (4,)),
        (expert_parallel, (2, 3, 8)),
        (replicated, (2,)),
        (fsdp1, (3,)),
        (fsdp1_original, (3,)),
        (fsdp1_gradients, (2,)),
        (fsdp1_hybrid, (4,)),
        (zero3, (3,)),
    ]
}
"""Layouts, and the numbers of processes with which they are tested."""


CANNOT_RUN = ("zero3", "uneven_tensor_parallel", "replicated")
"""Layouts with which PyTorch cannot run the model."""


def plain(name: str) -> Model:
    """Returns the model of a layout as one process has it without any."""
    if name == "expert_parallel":
        return Experts()
    net = ShardedNet(inner=13 if name == "uneven_tensor_parallel" else 12)
    return _without_frozen(net) if name.startswith("fsdp1") else net


def whole(model: Model) -> dict[str, torch.Tensor]:
    """Returns the whole tensors under plain names; gathers them, as a call of all processes."""
    named = {}
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            named = {n: t.detach().clone() for n, t in model.named_parameters(remove_duplicate=False)}
    else:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        for name, tensor in model.named_parameters(remove_duplicate=False):
            named[name] = _whole(tensor).detach().clone()
    named |= {name: tensor.clone() for name, tensor in model.named_buffers(remove_duplicate=False)}
    return {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in named.items()}


def _whole(tensor: Any) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_tensor"):
        pieces = [torch.empty_like(tensor.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.ds_tensor)
        return torch.cat(pieces)[: tensor.ds_numel].view(tensor.ds_shape)
    return tensor


def step(model: Model, optimizer: Any, number: int) -> None:
    """Takes a real step of a training, or changes what this process holds of a model that cannot run."""
    if optimizer is None:
        for parameter in model.parameters():
            local = getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter.data))
            local.detach().mul_(0.75).add_(0.125)
        return
    torch.manual_seed(number)
    model(torch.randint(11, (6, 4))).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: Model, name: str) -> Any:
    """Returns an optimizer; None for a model that cannot run."""
    if name in CANNOT_RUN:
        return None
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
