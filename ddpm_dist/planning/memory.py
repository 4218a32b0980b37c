"""Bytes of a training process, by ZeRO stage (Rajbhandari et al. 2020, section 3) and micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_dist.engine import MAX_BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from ddpm_dist.planning.network import BYTES, Counted

ALLGATHER_ELEMENTS = 2 * MAX_BUCKET_ELEMENTS
"""Weights that a rank gets at once after a step (engine/start.py)."""
REUSE_ELEMENTS = 10**9
"""DeepSpeed's stage3_max_reuse_distance, which we leave at its default."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA's context and the libraries' workspaces on a GPU: what such processes are seen to take; not measured by us."""
SLACK = 1.1
"""Of the activations: workspaces of convolutions, temporaries of a layer, fragmentation. An assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one training process at its fullest, at the end of a forward pass or in the step."""

    between_steps: float
    """Weights, masters, moments, averages, and what the stage keeps beside them."""
    gradients: float
    """And the buckets in which they are reduced."""
    activations: float
    overhead: float
    """The device's own."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.between_steps + self.gradients + self.activations + self.overhead


def bytes_between_steps(
    numels: Sequence[int], stage: int, precision: str, ranks: int, averages: int = 1, offload: bool = False
) -> float:
    """What a rank holds between two steps on its device. numels: elements of each parameter.

    For each element: weights that the network computes with (2 bytes in bf16 and fp16, 4 in fp32; cut under stage 3), a
    float32 master (in fp32 another copy, but for stage 0), two moments (cut from stage 1 on) and the averages (always
    cut). Gradients are freed after the step, but stage 1 in bf16 keeps their float32 sums, and stage 3 its share of
    them, the bucket in which they are reduced, and small parameters whole. offload: masters and moments are in host
    memory. `python -m tools.bench.training memory` measures it: ratio 1.000 for seven pairs of stage and precision.
    """
    total, weight = sum(numels), BYTES[precision]
    if stage == 0:
        return total * (weight + 8 + 4 * averages / ranks)
    cut = total * ((0 if offload else 4 + 8) + 4 * averages) / ranks
    if stage == 3:
        whole = sum(numel for numel in numels if numel <= PERSISTENT_ELEMENTS)
        return cut + total * (weight + 4) / ranks + 4 * min(total, MAX_BUCKET_ELEMENTS) + weight * whole
    return cut + total * (weight + (4 if (stage, precision) == (1, "bf16") else 0))


def bytes_of_gradients(numels: Sequence[int], stage: int, precision: str, ranks: int) -> float:
    """What the backward pass and the reduction need beside that: gradients in compute precision and float32 buckets.

    Stages 0 and 1 hold them whole, 2 and 3 a rank's share and a bucket; stage 3 the weights as well.
    """
    total, weight = sum(numels), BYTES[precision]
    bucket = 4 * min(total, MAX_BUCKET_ELEMENTS)
    if stage == 0:
        return 4 * total
    if stage == 1:
        return weight * total + bucket + (0 if precision == "bf16" else 4 * total / ranks)
    if stage == 2:
        return 4 * total / ranks + 2 * bucket
    return bucket + weight * (total if stays_gathered(total) else max(numels))


def stays_gathered(elements: int) -> bool:
    """Whether stage 3 keeps the weights of a network whole from their use in the forward to that in the backward pass.

    It does where they are used again within REUSE_ELEMENTS, and the first one's way is twice through all of them.
    """
    return 2 * elements < REUSE_ELEMENTS


def memory_of(
    counted: Counted,
    stage: int,
    precision: str,
    ranks: int,
    micro_batch: int,
    averages: int = 1,
    offload: bool = False,
    on_gpu: bool = True,
) -> Memory:
    """Memory of one of `ranks` processes with `micro_batch` images in a forward pass. averages: of the weights."""
    return Memory(
        between_steps=bytes_between_steps(counted.numels, stage, precision, ranks, averages, offload),
        gradients=bytes_of_gradients(counted.numels, stage, precision, ranks),
        activations=SLACK * (counted.activation_bytes * micro_batch + counted.fixed_bytes),
        overhead=CONTEXT_BYTES if on_gpu else 0.0,
    )


def largest_micro_batch(counted: Counted, stage: int, precision: str, ranks: int, room: float, share: int) -> int:
    """The largest divisor of a rank's share of the batch whose memory fits `room` bytes of a GPU; 0 if none does."""
    fits = [
        m
        for m in range(1, share + 1)
        if share % m == 0 and memory_of(counted, stage, precision, ranks, m).total <= room
    ]
    return max(fits, default=0)
