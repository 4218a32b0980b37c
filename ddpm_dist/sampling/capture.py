"""CUDA graphs of the network: a batch's kernels are recorded once and replayed, without Python in between.

A sampling job calls one network hundreds of times with the same shapes, and the last batch is padded, so a
recording is always reused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.diffusion import Network

_WARM_UPS = 3


class Captured:
    """Calls like the network that it wraps; one graph per shape of input."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor | None], Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        key = (x.shape, x.dtype, t.dtype, labels is None)
        if key not in self._graphs:
            self._graphs[key] = self._record(x.clone(), t.clone(), None if labels is None else labels.clone())
        graph, (static_x, static_t, static_labels), output = self._graphs[key]
        static_x.copy_(x)
        static_t.copy_(t)
        if labels is not None and static_labels is not None:
            static_labels.copy_(labels)
        graph.replay()
        return output.clone()

    def _record(
        self, x: Tensor, t: Tensor, labels: Tensor | None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor | None], Tensor]:
        # Warm-up on a side stream, as torch.cuda.graph demands: libraries pick and load their kernels there.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._network(x, t, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may use the device meanwhile (an upload's copy): it is not part of the recording, nor its end.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._network(x, t, labels)
        return graph, (x, t, labels), output


def captured(network: Network, device: torch.device) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The network itself on a CPU, where there is nothing to save; captured on CUDA."""
    return Captured(network) if device.type == "cuda" else network
