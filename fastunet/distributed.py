"""Several processes as one: statistics of batch norms and losses over all of them, with exact gradients under DDP.

DDP averages gradients. Where every process computes the same loss of what :func:`gathered` gives, that average is the
gradient of one process with all the batches.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """How many processes of ``torch.distributed`` there are; 1 where it is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of the processes this is; 0 where there is one."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, if it did: by NCCL on GPUs, by gloo on CPUs."""
    started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started or dist.is_initialized():
        yield
        return
    with group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"):
        yield


@contextmanager
def group(backend: str, **options: Any) -> Iterator[None]:
    """Inside, there is the default group of processes; afterwards none of gloo's threads, unless something holds it.

    The threads end with the last reference to the group. One that is left may be about to free a tensor, for which it
    needs the interpreter: if the interpreter is ending just then, the process is aborted.
    """
    importlib.import_module("torch.distributed.nn")  # if it is first imported inside, as by DDP, it holds the group
    dist.init_process_group(backend, **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def largest(*numbers: int) -> list[int]:
    """Of each of ``numbers`` the largest of all processes; each has to ask."""
    if processes() == 1:
        return [*numbers]
    everywhere = torch.tensor(numbers)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    largest: list[int] = everywhere.tolist()
    return largest


def mean(x: Tensor) -> Tensor:
    """The mean of the x of all processes, which have to be of one shape; each has to ask."""
    if processes() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / processes()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        everywhere = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
        dist.all_gather(everywhere, x.contiguous())
        return torch.stack(everywhere)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gathered(x: Tensor) -> Tensor:
    """(processes, \\*x.shape): the x of every process, which has to be of one shape; differentiable.

    The gradient of x is that of the sum of all processes' losses.
    """
    if processes() == 1:
        return x[None]
    everywhere: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return everywhere


def merged(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (C,) of ``count`` values per channel here, over the values of all processes."""
    if processes() == 1:
        return mean, var, count
    means, variances, counts = gathered(torch.stack([mean, var, torch.full_like(mean, count)])).unbind(1)
    total = counts.detach().sum(0)
    share = counts.detach() / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean, var, round(float(total[0]))


class SyncBatchNorm(nn.BatchNorm2d):
    """A batch norm whose statistics in training are those of all processes, on any device.

    The networks of fastunet normalise by it lazily, as by nn.BatchNorm2d: only means and variances are communicated.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or processes() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        mean, var, count = merged(mean, var, x.numel() // x.shape[1])
        if self.track_running_stats and self.running_mean is not None:
            self._advance(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(var + self.eps)
        z = (wide - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        if self.affine:
            z = z * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return z.to(x.dtype)

    def _advance(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(new.to(running.dtype), momentum)


def synchronise(model: nn.Module) -> nn.Module:
    """Turn every nn.BatchNorm2d of ``model`` into a :class:`SyncBatchNorm`, in place; parameters and keys stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model


# ---- parameters in shards ----------------------------------------------------------------------------------------


def shard(module: nn.Module, device: torch.device) -> None:
    """Leave each process its share of the parameters, and so of the optimiser's state (FSDP2), in place.

    A call of ``module`` gathers them for its time; modules inside it are called as ever.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh(device.type, (processes(),)))


def whole(state: Any) -> Any:
    """``state``, of tensors in dicts and lists, without shards: with the whole tensors; each process has to ask."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    return state.full_tensor() if _in_shards(state) else state


def whole_module(module: nn.Module) -> nn.Module:
    """``module``, or where its parameters are in shards a copy with whole ones; each process has to ask."""
    if not any(map(_in_shards, module.parameters())):
        return module
    copies: dict[int, Any] = {id(p): nn.Parameter(whole(p.detach()), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, copies)


def shared_out(state: Any, like: Tensor) -> Any:
    """``state``, a dict of tensors or one, with the share of this process of what has the shape of ``like``, if that is
    in shards."""
    if isinstance(state, dict):
        return {name: shared_out(value, like) for name, value in state.items()}
    if not _in_shards(like) or not isinstance(state, Tensor) or state.shape != like.shape:
        return state
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def _in_shards(value: Any) -> bool:
    return processes() > 1 and hasattr(value, "full_tensor")
