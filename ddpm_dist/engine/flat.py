"""Gradients of DeepSpeed's flat optimizers in few operations, where it takes some for each parameter.

On a GPU each operation is the launch of a kernel, and a network has hundreds of parameters. What is computed stays the
same, to the last bit (but ZeRO-2 divides by a number of ranks that is no power of 2 in float32, not in bfloat16). A
function here replaces methods of one DeepSpeed optimizer; tests/engine/test_engine.py holds the result to plain torch,
tests/engine/test_operations.py counts.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CLIP_EPS = 1e-6
"""As DeepSpeed's."""


def shorten_bf16(optimizer: Any, bucket: int) -> None:
    """BF16_Optimizer (ZeRO-1): gradients are widened and added by buckets of elements, then measured and clipped
    together; the host reads one number, the norm."""
    (parameters,), (flat,) = optimizer.bf16_groups, optimizer.fp32_groups_actual_gradients_flat
    buckets = list(_buckets(parameters, bucket))
    targets = flat.split([sum(p.numel() for p in some) for some in buckets])

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for some, target in zip(buckets, targets, strict=True):
            target.add_(_taken(some))

    @torch.no_grad()
    def step(closure: None = None) -> None:
        norm = _norm(torch._foreach_norm(optimizer.fp32_groups_gradients[0]))
        optimizer.overflow = not math.isfinite(norm)
        optimizer._global_grad_norm = math.inf if optimizer.overflow else norm
        if optimizer.overflow:
            return  # the engine zeroes the gradients in both cases
        (master,), (gradient,) = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
        factor = float(optimizer.clip_grad / (norm + CLIP_EPS))
        if factor < 1:
            gradient.mul_(factor)
        master.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()

    optimizer.update_hp_grads, optimizer.step = update_hp_grads, step


def shorten_zero(optimizer: Any, bucket: int) -> None:
    """DeepSpeedZeroOptimizer (ZeRO-2; ZeRO-1 in float32 and fp16) with its masters on the device: the norm of all
    gradients at once, and read once. ZeRO-2 in bf16 and fp16 also reduces and adds them by buckets."""
    # It would look at each gradient by itself (13 operations each); the norm, right after, decides the same.
    optimizer.check_overflow = lambda partition_gradients=True: setattr(optimizer, "overflow", False)
    optimizer.scaled_global_norm = partial(_global_norm, optimizer)
    if optimizer.partition_gradients and optimizer.dtype != torch.float32:
        reduction = _Reduction(optimizer, bucket)
        optimizer.process_gradients, optimizer.reduce_ipg_grads = reduction.collect, reduction.reduce


class _Reduction:
    """ZeRO-2's: gradients wait until they fill a bucket, are averaged over the ranks in float32, and this rank adds
    its part of them to its sums."""

    def __init__(self, optimizer: Any, bucket: int) -> None:
        self._optimizer, self._bucket = optimizer, bucket
        self._group = optimizer.dp_process_group
        self._waiting: list[Tensor] = []
        rank = dist.get_rank(self._group)
        self._offsets, self._targets = (
            optimizer.grad_start_offset[0][rank],
            optimizer.grad_partition_insertion_offset[0][rank],
        )

    def collect(self, parameter: Tensor, group: int) -> None:
        """`process_gradients`: called as soon as a parameter has its gradient."""
        if self._waiting and sum(p.numel() for p in self._waiting) + parameter.numel() > self._bucket:
            self.reduce()
        self._waiting.append(parameter)

    @torch.no_grad()
    def reduce(self, comm_dtype: torch.dtype | None = None) -> None:
        """`reduce_ipg_grads`: of what waits, also at the end of a backward pass."""
        parameters, self._waiting = self._waiting, []
        if not parameters:
            return
        mean = _taken(parameters).float()
        if (world_size := dist.get_world_size(self._group)) > 1:
            dist.all_reduce(mean.div_(world_size), group=self._group)
        sums = self._optimizer._get_compact_grad_partition_buffer(0).flat_partition
        into, parts = [], []
        for parameter, found in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            at = self._optimizer.get_param_id(parameter)
            if at in self._offsets:
                target = sums[self._targets[at] :][: parameter.numel() - self._offsets[at]]
                into.append(target)
                parts.append(found[self._offsets[at] :][: target.numel()])
        if into:
            torch._foreach_add_(into, parts)


def _buckets(parameters: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Neighbours with at most so many elements together, or one alone."""
    some: list[Tensor] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > elements:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def _taken(parameters: Sequence[Any]) -> Tensor:
    """The gradients end to end, in their dtype; the parameters have none afterwards. One that wasn't used counts 0."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([grad.reshape(-1) for grad in grads])


def _global_norm(optimizer: Any) -> Tensor:
    """`scaled_global_norm`: of all ranks' parts. float32, in host memory: what follows asks it twice."""
    norms = torch._foreach_norm(list(optimizer.averaged_gradients[0]), dtype=torch.float64)
    return _norm(norms, optimizer.dp_process_group)


def _norm(norms: Sequence[Tensor], group: Any = None) -> Tensor:
    """Of the tensors with these norms (and, with a group, of all its ranks' ones), float32, in host memory."""
    total = torch.stack(list(norms)).pow(2).sum().float()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total.pow(0.5).cpu()
